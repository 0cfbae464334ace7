// Rows: what normalises them, packed copies for the tile loop, and exact similarities in double.
// Compiled once per instruction set.
namespace sapwood::similarity::SAPWOOD_ISA {

// Double sums of vectors of T: as many lanes of double as fit one register.
template <class T>
struct Wide {
  static constexpr int count = SAPWOOD_VECTOR_BYTES / 8;
  typedef double sum __attribute__((vector_size(SAPWOOD_VECTOR_BYTES)));
  typedef T type __attribute__((vector_size(count * sizeof(T))));

  SAPWOOD_TARGET static SAPWOOD_INLINE sum load(const T* from) {
    type values;
    __builtin_memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, sum);
  }
};

// Halves are added until one lane is left: few additions wait for one another.
template <class V>
SAPWOOD_TARGET SAPWOOD_INLINE double total(const V& lanes) {
  constexpr size_t kCount = sizeof(V) / sizeof(double);
  double sums[kCount];
  for (size_t i = 0; i < kCount; ++i) sums[i] = lanes[i];
  for (size_t half = kCount / 2; half > 0; half /= 2) {
    for (size_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// The largest magnitude, whether all entries are finite, and whether they are all the same.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void inspect(const T* __restrict x, int64_t d, T& peak, bool& finite,
                                           bool& constant) {
  T largest = 0;
  int different = 0, broken = 0;
  for (int64_t c = 0; c < d; ++c) {
    const T magnitude = x[c] < 0 ? -x[c] : x[c];
    largest = magnitude > largest ? magnitude : largest;
    broken |= !(magnitude <= std::numeric_limits<T>::max());
    different |= x[c] != x[0];
  }
  peak = largest;
  finite = !broken;
  constant = !different;
}

// Sums of (x * scale - mean) and of its square, in double and in a fixed order.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE void moments(const T* x, int64_t d, double scale, double mean,
                                           double& sum, double& squares) {
  using W = Wide<T>;
  typename W::sum first[2] = {}, second[2] = {};
  int64_t c = 0;
  for (; c + 2 * W::count <= d; c += 2 * W::count) {
    for (int s = 0; s < 2; ++s) {
      const typename W::sum v = W::load(x + c + s * W::count) * scale - mean;
      first[s] += v;
      second[s] += v * v;
    }
  }
  sum = total(first[0] + first[1]);
  squares = total(second[0] + second[1]);
  for (; c < d; ++c) {
    const double v = static_cast<double>(x[c]) * scale - mean;
    sum += v;
    squares += v * v;
  }
}

// The sum of squares alone, in double and in a fixed order.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE double sum_of_squares(const T* x, int64_t d) {
  using W = Wide<T>;
  typename W::sum sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * W::count <= d; c += 4 * W::count) {
    for (int s = 0; s < 4; ++s) {
      const typename W::sum v = W::load(x + c + s * W::count);
      sums[s] += v * v;
    }
  }
  double squares = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < d; ++c) squares += static_cast<double>(x[c]) * static_cast<double>(x[c]);
  return squares;
}

template <class T>
SAPWOOD_TARGET void row_peak(const T* x, int64_t d, double& peak, bool& finite) {
  T largest = 0;
  bool constant = false;
  inspect(x, d, largest, finite, constant);
  peak = finite ? static_cast<double>(largest) : 0.0;
}

// What normalises one row; `squares` is the squared norm of the scaled, centred row.
template <class T>
SAPWOOD_TARGET void describe_row(const T* x, int64_t d, Kind kind, double fixed_scale, Row& row,
                                 double& squares) {
  // Squares of floats neither overflow nor vanish in double, and tell whether all are finite.
  const bool one_pass = sizeof(T) == 4 && kind != Kind::correlation;
  double sum = 0;
  row = {is_unit(kind) ? 1.0 : fixed_scale, 0.0, 0.0, true};
  if (!one_pass) {
    T peak = 0;
    bool constant = false;
    inspect(x, d, peak, row.finite, constant);
    if (is_unit(kind)) row.scale = scale_for(static_cast<double>(peak));
    squares = 0;
    if (!row.finite || (kind == Kind::correlation && constant)) return;
    if (kind == Kind::correlation) {
      moments(x, d, row.scale, 0.0, sum, squares);
      row.mean = sum / static_cast<double>(d);
    }
  }
  if (row.scale == 1.0 && row.mean == 0.0) {
    squares = sum_of_squares(x, d);
  } else {
    moments(x, d, row.scale, row.mean, sum, squares);
  }
  if (one_pass && !(squares <= std::numeric_limits<double>::max())) {
    row.finite = false;
    squares = 0;
    return;
  }
  row.inverse = !is_unit(kind) ? 1.0 : squares > 0 ? 1.0 / std::sqrt(squares) : 0.0;
}

template <class T>
SAPWOOD_TARGET void squared_norm(const T* x, int64_t d, double& squares) {
  squares = sum_of_squares(x, d);
}

// The similarity of two described rows in double, before the common scale is taken out.
template <class T>
SAPWOOD_TARGET void exact_similarity(const T* x, const T* y, int64_t d, const Row& a, const Row& b,
                                     bool euclidean, double& result) {
  using W = Wide<T>;
  if (a.inverse == 0 || b.inverse == 0) {
    result = euclidean ? -std::numeric_limits<double>::infinity() : 0.0;
    return;
  }
  typename W::sum sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * W::count <= d; c += 4 * W::count) {
    for (int s = 0; s < 4; ++s) {
      const typename W::sum u = W::load(x + c + s * W::count) * a.scale - a.mean;
      const typename W::sum v = W::load(y + c + s * W::count) * b.scale - b.mean;
      sums[s] += euclidean ? (u - v) * (u - v) : u * v;
    }
  }
  double sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < d; ++c) {
    const double u = static_cast<double>(x[c]) * a.scale - a.mean;
    const double v = static_cast<double>(y[c]) * b.scale - b.mean;
    sum += euclidean ? (u - v) * (u - v) : u * v;
  }
  result = euclidean ? -sum : sum * a.inverse * b.inverse;
}

// Whether a factor keeps its relative precision in T, so that a row may be scaled in T.
template <class T>
SAPWOOD_TARGET SAPWOOD_INLINE bool is_normal(double factor) {
  return factor >= static_cast<double>(std::numeric_limits<T>::min()) &&
         factor <= static_cast<double>(std::numeric_limits<T>::max());
}

// to[c] = (x[c] * scale - mean) * inverse - shift[c] (no shift where null), rounded once; rounded
// twice where a row is only scaled, which takes half the time.
template <class T>
SAPWOOD_TARGET void normalize_row(const T* __restrict x, T* __restrict to, int64_t d,
                                  const Row& row, const double* __restrict shift) {
  const double scale = row.scale, mean = row.mean, inverse = row.inverse;
  if (inverse == 0) {
    for (int64_t c = 0; c < d; ++c) to[c] = T(0);
  } else if (shift == nullptr && scale == 1.0 && mean == 0.0 && is_normal<T>(inverse)) {
    const T factor = static_cast<T>(inverse);
    for (int64_t c = 0; c < d; ++c) to[c] = x[c] * factor;
  } else if (shift == nullptr) {
    for (int64_t c = 0; c < d; ++c) {
      to[c] = static_cast<T>((static_cast<double>(x[c]) * scale - mean) * inverse);
    }
  } else {
    for (int64_t c = 0; c < d; ++c) {
      to[c] = static_cast<T>(static_cast<double>(x[c]) * scale - shift[c]);
    }
  }
}

// The upper half of a finite float, rounded to nearest, ties to even.
SAPWOOD_TARGET SAPWOOD_INLINE uint32_t bf16_bits(float v) {
  uint32_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof bits);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

// Pairs of entries in bfloat16, as words of the size of an entry.
SAPWOOD_TARGET inline void round_to_pairs(const float* __restrict x, int64_t d,
                                          float* __restrict to) {
  for (int64_t c = 0; c < d; c += 2) {
    const uint32_t pair = bf16_bits(x[c]) | (c + 1 < d ? bf16_bits(x[c + 1]) << 16 : 0u);
    __builtin_memcpy(to + c / 2, &pair, sizeof pair);
  }
}

// packed[c * width + i] = rows[i * k + c] for i < count, 0 for count <= i < width.
template <class T>
SAPWOOD_TARGET void pack_panel(const T* __restrict rows, int64_t count, int64_t k, int64_t width,
                               T* __restrict packed) {
  constexpr int64_t kBlock = 16;  // columns at a time, so that a line of each row is used whole
  for (int64_t first = 0; first < k; first += kBlock) {
    const int64_t last = std::min(k, first + kBlock);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = first; c < last; ++c) packed[c * width + i] = rows[i * k + c];
    }
    for (int64_t c = first; c < last; ++c) {
      for (int64_t i = count; i < width; ++i) packed[c * width + i] = T(0);
    }
  }
}

}  // namespace sapwood::similarity::SAPWOOD_ISA
