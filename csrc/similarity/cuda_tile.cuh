// A 64 x 64 tile of similarities in registers, and the decision about its values. Distances are summed
// as squares of differences, which cancel nothing.
#pragma once

#include "similarity/cuda_rows.cuh"

#if defined(__CUDA_ARCH__)  // the host compiler does not know the pragma
#define SAPWOOD_ROLLED _Pragma("unroll 1")
#else
#define SAPWOOD_ROLLED
#endif

namespace sapwood::similarity::device {

inline constexpr int kTile = 64;
inline constexpr int kDepth = 8;  // columns of the operands in shared memory at a time
inline constexpr int kPitch = kTile + 1;
inline constexpr int kRowsPerThread = 8, kColumnsPerThread = 4;
inline constexpr int kThreadColumns = kTile / kColumnsPerThread;
static_assert(kThreads == kTile / kRowsPerThread * kThreadColumns);

// What is compared with what.
template <class T>
struct Search {
  Operand<T> x, y;  // the same one for x with itself
  int64_t k;
  Kind kind;
  bool self, absolute, include_self, recheck;
  double relative, absolute_error;  // tolerance = relative * size + absolute_error

  SAPWOOD_HD double key(double value) const { return absolute ? fabs(value) : value; }

  // How far a product of rows i and j may be from the exact value.
  SAPWOOD_HD double tolerance(int64_t i, int64_t j, double value) const {
    if (!recheck) return 0.0;
    if (is_unit(kind)) return relative;
    if (kind == Kind::dot) return relative * x.rows[i].weight * y.rows[j].weight + absolute_error;
    return relative * fabs(value) + absolute_error;
  }

  // Whether (i, j) is a pair at all.
  SAPWOOD_HD bool concerns(int64_t i, int64_t j) const {
    return i < x.n && j < y.n && (!self || j > i || (j == i && include_self));
  }

  // From the original rows, in double and in the order of the columns.
  SAPWOOD_HD double exact(int64_t i, int64_t j) const {
    const Row a = x.rows[i], b = y.rows[j];
    if (a.inverse == 0.0 || b.inverse == 0.0) {
      return kind == Kind::euclidean ? -static_cast<double>(INFINITY) : 0.0;
    }
    const T* u = x.x + i * k;
    const T* v = y.x + j * k;
    double sum = 0;
    SAPWOOD_ROLLED
    for (int64_t c = 0; c < k; ++c) {  // rare, and not worth the registers
      const double p = static_cast<double>(u[c]) * a.scale - a.mean;
      const double q = static_cast<double>(v[c]) * b.scale - b.mean;
      sum += kind == Kind::euclidean ? (p - q) * (p - q) : p * q;
    }
    return kind == Kind::euclidean ? -sum : sum * a.inverse * b.inverse;
  }

  // A product as a value: rows that are not finite are infinitely far from all.
  SAPWOOD_HD double value_of(int64_t i, int64_t j, T product) const {
    if (kind != Kind::euclidean) return static_cast<double>(product);
    const bool far = x.rows[i].inverse == 0.0 || y.rows[j].inverse == 0.0;
    return far ? -static_cast<double>(INFINITY) : -static_cast<double>(product);
  }

  // The value as it is reported: exact where the product is too close to the limit, or overflowed.
  SAPWOOD_HD double decided(int64_t i, int64_t j, T product, double limit) const {
    const double value = value_of(i, j, product);
    const bool finite = value - value == 0.0;
    if (!recheck || (finite && fabs(key(value) - limit) > tolerance(i, j, value))) return value;
    return exact(i, j);
  }
};

template <class T>
struct Sums {
  T at[kRowsPerThread][kColumnsPerThread];
};

// Copies kDepth columns of 64 rows, 0 outside.
template <class T>
__device__ void stage(const T* rows, int64_t n, int64_t first, int64_t k, int64_t column, T* to) {
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kDepth; e += kThreads) {
    const int r = e / kDepth, c = e % kDepth;
    const bool inside = first + r < n && column + c < k;
    to[c * kPitch + r] = inside ? rows[(first + r) * k + column + c] : T(0);
  }
}

// Thread t holds rows t / 16 * 8 .. + 7 and columns t % 16 + 16 q of the tile (first_x, first_y).
template <class T>
__device__ void multiply(const Search<T>& s, int64_t first_x, int64_t first_y, T* left, T* right,
                         Sums<T>& sums) {
  const int row = static_cast<int>(threadIdx.x) / kThreadColumns * kRowsPerThread;
  const int column = static_cast<int>(threadIdx.x) % kThreadColumns;
  SAPWOOD_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    SAPWOOD_UNROLL
    for (int q = 0; q < kColumnsPerThread; ++q) sums.at[r][q] = T(0);
  }
  for (int64_t c = 0; c < s.k; c += kDepth) {
    __syncthreads();  // the previous columns have been read
    stage(s.x.unit, s.x.n, first_x, s.k, c, left);
    stage(s.y.unit, s.y.n, first_y, s.k, c, right);
    __syncthreads();
    for (int d = 0; d < kDepth; ++d) {
      T a[kRowsPerThread], b[kColumnsPerThread];
      SAPWOOD_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) a[r] = left[d * kPitch + row + r];
      SAPWOOD_UNROLL
      for (int q = 0; q < kColumnsPerThread; ++q) {
        b[q] = right[d * kPitch + column + q * kThreadColumns];
      }
      SAPWOOD_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) {
        SAPWOOD_UNROLL
        for (int q = 0; q < kColumnsPerThread; ++q) {
          const T difference = a[r] - b[q];
          sums.at[r][q] += s.kind == Kind::euclidean ? difference * difference : a[r] * b[q];
        }
      }
    }
  }
}

// Tiles of the search in order of rows; x with itself skips those below the diagonal.
struct Tiles {
  int64_t rows, columns;

  template <class T>
  SAPWOOD_HD static Tiles of(const Search<T>& s) {
    return {(s.x.n + kTile - 1) / kTile, (s.y.n + kTile - 1) / kTile};
  }
  SAPWOOD_HD int64_t count() const { return rows * columns; }
};

// Puts the tile where every thread can read it, rows first with kPitch entries each.
template <class T>
__device__ void share(const Sums<T>& sums, T* products) {
  const int row = static_cast<int>(threadIdx.x) / kThreadColumns * kRowsPerThread;
  const int column = static_cast<int>(threadIdx.x) % kThreadColumns;
  __syncthreads();  // the previous tile has been read
  SAPWOOD_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    SAPWOOD_UNROLL
    for (int q = 0; q < kColumnsPerThread; ++q) {
      products[(row + r) * kPitch + column + q * kThreadColumns] = sums.at[r][q];
    }
  }
  __syncthreads();
}

// f(i, j, product) for this thread's share of a tile, as far as the entries are pairs. A loop that is
// not unrolled: what f does is rare and would take registers for every entry.
template <class T, class F>
__device__ void each_pair(const Search<T>& s, int64_t first_x, int64_t first_y, const T* products,
                          const F& f) {
  for (int e = static_cast<int>(threadIdx.x); e < kTile * kTile; e += kThreads) {
    const int row = e / kTile, column = e % kTile;
    const int64_t i = first_x + row, j = first_y + column;
    if (s.concerns(i, j)) f(i, j, products[row * kPitch + column]);
  }
}

}  // namespace sapwood::similarity::device
