// Sum-product circuits on the device: a block walks a row level by level, a warp at a time takes a
// sum, and on the way back a column: it gathers from all that read it, so that nothing is added in an
// order that could change. Values and slopes are double, exponentials are taken in T.
#pragma once

#include "logsemiring/circuit.h"
#include "logsemiring/cuda_sequence.cuh"

namespace sapwood::logsemiring::device {

inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int64_t kCircuitBlocks = 2048;  // more than any GPU runs at once

// x (m, B, k) of any strides, side by side in each row.
template <class T>
struct CircuitInput {
  const T* data;
  int64_t block, row, col, width;

  SAPWOOD_HD double operator()(int64_t r, int64_t i) const {
    return static_cast<double>(data[i / width * block + r * row + i % width * col]);
  }
};

struct CircuitRows {
  int64_t rows;
  const int64_t* evidence;  // (B, columns)
  int64_t evidence_columns;
};

// What a block keeps of its row; all but the values may be null on the way there.
struct CircuitState {
  double* values;  // (blocks, columns)
  double* slopes;  // (blocks, columns)
  double* tops;    // (blocks, sums) the maximum of the terms of a sum
  double* shares;  // (blocks, sums) what turns a scaled term into a probability
  int32_t* lists;  // (blocks, sums) which list its evidence selects, -1 for none

  SAPWOOD_HD CircuitState at(int64_t block, const CircuitCounts& n) const {
    const int64_t c = block * n.columns(), s = block * n.sums;
    if (slopes == nullptr) return {values + c, nullptr, nullptr, nullptr, nullptr};
    return {values + c, slopes + c, tops + s, shares + s, lists + s};
  }
};

// exp(x - top) in T, by the rules of `scaled`.
template <class T>
SAPWOOD_HD inline T scaled_term(double x, double top) {
  if (x == top) return top == -infinity<double>() ? T(0) : T(1);
  return std::exp(static_cast<T>(x - (top == -infinity<double>() ? 0.0 : top)));
}

__device__ inline double circuit_term(const Circuit& c, const double* values, int64_t term) {
  double product = 0;
  SAPWOOD_ROLLED
  for (int64_t f = c.factor_ptr[term]; f < c.factor_ptr[term + 1]; ++f) {
    product += values[c.factors[f]];
  }
  return product;
}

// The maximum of `count` terms, and the sum of the scaled ones; for all lanes of a warp.
template <class T, class F>
__device__ inline T warp_reduce(const F& term, int64_t count, int lane, double* top) {
  double most = -infinity<double>();
  SAPWOOD_ROLLED
  for (int64_t i = lane; i < count; i += kWarp) most = larger(term(i), most);
  most = warp_max(most);
  T sum = 0;
  SAPWOOD_ROLLED
  for (int64_t i = lane; i < count; i += kWarp) sum += scaled_term<T>(term(i), most);
  *top = most;
  return warp_sum(sum);
}

template <class T>
__device__ inline void normalize_head(double* head, int64_t count, int lane) {
  double top;
  const T sum = warp_reduce<T>([&](int64_t i) { return head[i]; }, count, lane, &top);
  const bool finite = top > -infinity<double>() && top < infinity<double>();
  const double total = finite ? top + static_cast<double>(std::log(sum)) : NAN;
  for (int64_t i = lane; i < count; i += kWarp) head[i] -= total;
}

template <class T>
__device__ inline void evaluate_sum(const Circuit& c, int64_t sum, const int64_t* evidence,
                                    const CircuitState& s, int lane) {
  const int64_t list = c.list_of(sum, evidence);
  double top = -infinity<double>();
  T total = 0;
  if (list >= 0) {
    const int64_t first = c.term_ptr[list], count = c.term_ptr[list + 1] - first;
    total = warp_reduce<T>([&](int64_t i) { return circuit_term(c, s.values, first + i); }, count,
                           lane, &top);
  }
  if (lane != 0) return;
  const bool finite = top > -infinity<double>() && top < infinity<double>();
  s.values[c.n.inputs + sum] = total != total ? static_cast<double>(total)
                               : finite       ? top + static_cast<double>(std::log(total))
                                              : top;
  if (s.lists == nullptr) return;
  s.lists[sum] = static_cast<int32_t>(list);
  s.tops[sum] = top;
  s.shares[sum] = static_cast<double>(inverse(static_cast<T>(top), total));
}

// Fills in all columns of a row; a barrier follows each level.
template <class T>
__device__ inline void walk_row(const Circuit& c, const CircuitInput<T>& x, const CircuitRows& g,
                                int64_t row, const CircuitState& s) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = threadIdx.x / kWarp;
  for (int64_t i = threadIdx.x; i < c.n.inputs; i += kThreads) s.values[i] = x(row, i);
  __syncthreads();
  for (int64_t h = warp; h < c.n.heads; h += kWarps) {
    const int32_t begin = c.heads[2 * h], end = c.heads[2 * h + 1];
    normalize_head<T>(s.values + begin, end - begin, lane);
  }
  __syncthreads();
  const int64_t* evidence = g.evidence != nullptr ? g.evidence + row * g.evidence_columns : nullptr;
  for (int64_t level = 0; level < c.n.levels; ++level) {
    for (int64_t i = c.level_ptr[level] + warp; i < c.level_ptr[level + 1]; i += kWarps) {
      evaluate_sum<T>(c, c.level_sums[i], evidence, s, lane);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    circuit_kernel(Circuit c, CircuitInput<T> x, CircuitRows g, CircuitState state, T* out) {
  const CircuitState s = state.at(blockIdx.x, c.n);
  for (int64_t row = blockIdx.x; row < g.rows; row += gridDim.x) {
    walk_row(c, x, g, row, s);
    for (int64_t r = threadIdx.x; r < c.n.results; r += kThreads) {
      out[row * c.n.results + r] = static_cast<T>(s.values[c.results[r]]);
    }
    __syncthreads();
  }
}

// Adds to the slope of a column what all that read it pass on.
template <class T>
__device__ inline void gather_slope(const Circuit& c, int64_t column, const CircuitState& s,
                                    int lane) {
  const int64_t first = c.reader_ptr[column], end = c.reader_ptr[column + 1];
  if (first == end) return;  // spares the sum over the warp
  double total = 0;
  SAPWOOD_ROLLED
  for (int64_t r = first + lane; r < end; r += kWarp) {
    const int64_t sum = c.readers[2 * r], term = c.readers[2 * r + 1], list = s.lists[sum];
    const double slope = s.slopes[c.n.inputs + sum];
    if (slope == 0 || list < 0 || term < c.term_ptr[list] || term >= c.term_ptr[list + 1]) continue;
    const T share = scaled_term<T>(circuit_term(c, s.values, term), s.tops[sum]);
    total += slope * s.shares[sum] * static_cast<double>(share);
  }
  total = warp_sum(total);
  if (lane == 0) s.slopes[column] += total;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    circuit_backward_kernel(Circuit c, CircuitInput<T> x, CircuitRows g, CircuitState state,
                            const T* grad, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = threadIdx.x / kWarp;
  const CircuitState s = state.at(blockIdx.x, c.n);
  for (int64_t row = blockIdx.x; row < g.rows; row += gridDim.x) {
    walk_row(c, x, g, row, s);
    for (int64_t i = threadIdx.x; i < c.n.columns(); i += kThreads) s.slopes[i] = 0;
    __syncthreads();
    for (int64_t r = 0; threadIdx.x == 0 && r < c.n.results; ++r) {  // a column may be named twice
      s.slopes[c.results[r]] += static_cast<double>(grad[row * c.n.results + r]);
    }
    __syncthreads();
    for (int64_t level = c.n.levels - 2; level >= 0; --level) {  // nothing reads the last one
      for (int64_t i = c.level_ptr[level] + warp; i < c.level_ptr[level + 1]; i += kWarps) {
        gather_slope<T>(c, c.n.inputs + c.level_sums[i], s, lane);
      }
      __syncthreads();
    }
    for (int64_t i = warp; i < c.n.inputs; i += kWarps) gather_slope<T>(c, i, s, lane);
    __syncthreads();
    for (int64_t h = warp; h < c.n.heads; h += kWarps) {
      double total = 0;
      const int64_t begin = c.heads[2 * h], end = c.heads[2 * h + 1];
      for (int64_t i = begin + lane; i < end; i += kWarp) total += s.slopes[i];
      total = warp_sum(total);
      for (int64_t i = begin + lane; i < end; i += kWarp) {
        s.slopes[i] -= static_cast<double>(std::exp(static_cast<T>(s.values[i]))) * total;
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < c.n.inputs; i += kThreads) {
      out[(i / x.width * g.rows + row) * x.width + i % x.width] = static_cast<T>(s.slopes[i]);
    }
  }
}

}  // namespace sapwood::logsemiring::device
