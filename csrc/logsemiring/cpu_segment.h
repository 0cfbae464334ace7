// Log-sum-exp and softmax over segments of the middle dimension of x (O, n, I).
#pragma once

#include <optional>
#include <tuple>

#include "logsemiring/cpu_tensors.h"

namespace sapwood::logsemiring {

// The entries of segment s are order[ptr[s]] ... order[ptr[s + 1] - 1]; without an order, they are
// ptr[s] ... ptr[s + 1] - 1.
struct Segments {
  const int64_t *ptr, *order;
  int64_t count;

  int64_t entry(int64_t i) const { return order != nullptr ? order[i] : i; }
};

inline constexpr int64_t kInner = 64;  // neighbouring columns that one task reduces side by side

// Maximum, sum and verdict of one segment for `width` columns: sum is 0 without mass, NaN with NaN
// among the terms, and the number of +inf terms where top is +inf.
template <class T>
void reduce_segment(const T* x, int64_t inner, const Segments& g, int64_t s, int64_t width, T* top,
                    T* sum) {
  std::fill_n(top, width, -kInf<T>);
  std::fill_n(sum, width, T(0));
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const T* row = x + g.entry(i) * inner;
    for (int64_t c = 0; c < width; ++c) top[c] = row[c] > top[c] ? row[c] : top[c];
  }
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const T* row = x + g.entry(i) * inner;
    for (int64_t c = 0; c < width; ++c) {
      const T d = row[c] == top[c] && row[c] != -kInf<T>
                      ? T(0)
                      : row[c] - (top[c] == -kInf<T> ? T(0) : top[c]);
      sum[c] += math::exp(d);
    }
  }
}

template <class T>
void segment_values(const T* x, int64_t inner, const Segments& g, int64_t s, int64_t width,
                    T* out) {
  T top[kInner], sum[kInner];
  reduce_segment(x, inner, g, s, width, top, sum);
  for (int64_t c = 0; c < width; ++c) {
    const bool infinite = top[c] == kInf<T> || top[c] == -kInf<T>;
    out[c] = sum[c] != sum[c] ? sum[c] : infinite ? top[c] : top[c] + math::log(sum[c]);
  }
}

// The probability of a term, given maximum and sum of its segment.
template <class T>
T share_of(T x, T top, T sum) {
  const T p = x == top ? T(1) : math::exp(x - top);
  return sum != sum ? sum : top == -kInf<T> ? T(0) : p / sum;
}

// Times scale[c] unless that is null.
template <class T>
void segment_weights(const T* x, int64_t inner, const Segments& g, int64_t s, int64_t width,
                     const T* scale, T* out) {
  T top[kInner], sum[kInner];
  reduce_segment(x, inner, g, s, width, top, sum);
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const T* row = x + g.entry(i) * inner;
    T* to = out + g.entry(i) * inner;
    for (int64_t c = 0; c < width; ++c) {
      const T share = share_of(row[c], top[c], sum[c]);
      to[c] = scale != nullptr ? scale[c] * share : share;
    }
  }
}

inline Segments segments_of(const char* op, const Tensor& x, const Tensor& ptr,
                            const std::optional<Tensor>& order) {
  check_dim(op, "x", x, 3);
  check_floating(op, "x", x);
  check_dim(op, "ptr", ptr, 1);
  check_dtype(op, "ptr", ptr, ptr.scalar_type() == ScalarType::Long, "int64");
  STD_TORCH_CHECK(ptr.numel() > 0, "sapwood.", op, ": ptr must not be empty, got (0,)");
  Segments g{data<int64_t>(ptr), nullptr, ptr.numel() - 1};
  int64_t entries = x.size(1);
  if (order) {
    check_dtype(op, "order", *order, order->scalar_type() == ScalarType::Long, "int64");
    check_shape(op, "order", *order, {x.size(1)});
    g.order = data<int64_t>(*order);
    uint64_t outside = 0;  // the sign of v or of last - v; without a branch gcc makes vectors of it
    for (int64_t i = 0; i < entries; ++i) {
      const uint64_t v = static_cast<uint64_t>(g.order[i]);
      outside |= v | (static_cast<uint64_t>(entries - 1) - v);
    }
    for (int64_t i = 0; outside >> 63 != 0 && i < entries; ++i) {
      STD_TORCH_CHECK(g.order[i] >= 0 && g.order[i] < entries, "sapwood.", op,
                      ": order must hold positions in x, got ", g.order[i]);
    }
  }
  bool valid = g.ptr[0] == 0 && g.ptr[g.count] == entries;
  for (int64_t s = 0; s < g.count; ++s) valid = valid && g.ptr[s] <= g.ptr[s + 1];
  STD_TORCH_CHECK(valid, "sapwood.", op, ": ptr must rise from 0 to x.size(1) = ", entries,
                  ", got other values");
  return g;
}

// One column: the terms are gathered and reduced on vectors. Values go to out[0], weights, times
// `scale`, to the entries of out. Returns false where the maximum is not finite.
template <bool weights, class T>
bool gathered_segment(const T* x, const Segments& g, int64_t s, Scratch<T>& scratch, T scale,
                      T* out) {
  const int64_t first = g.ptr[s], count = g.ptr[s + 1] - first;
  T *terms = scratch.get(), top = -kInf<T>, sum = 0;
  if (g.order == nullptr) {
    std::copy_n(x + first, count, terms);
  } else {
    for (int64_t i = 0; i < count; ++i) terms[i] = x[g.order[first + i]];
  }
  SAPWOOD_ISA_CALL(reduce_terms(terms, count, &top, &sum));
  if (!(top > -kInf<T> && top < kInf<T>) || sum != sum) return false;
  if constexpr (weights) {
    const T factor = scale / sum;
    if (g.order == nullptr) {
      for (int64_t i = 0; i < count; ++i) out[first + i] = terms[i] * factor;
    } else {
      for (int64_t i = 0; i < count; ++i) out[g.order[first + i]] = terms[i] * factor;
    }
  } else {
    out[0] = top + math::log(sum);
  }
  return true;
}

inline int64_t longest(const Segments& g) {
  int64_t most = 0;
  for (int64_t s = 0; s < g.count; ++s) most = std::max(most, g.ptr[s + 1] - g.ptr[s]);
  return most;
}

// f(outer, segment, first column, width, room for a segment of one column) for all blocks.
template <class T, class F>
void over_segments(const Tensor& x, const Segments& g, const F& f) {
  const int64_t inner = x.size(2), blocks = round_up(inner, kInner) / kInner;
  const int64_t tasks = x.size(0) * g.count * blocks;
  if (tasks == 0) return;
  const int64_t room = inner == 1 ? longest(g) + kStrip<T> : 0;
  const int64_t mean =
      std::max<int64_t>(1, x.size(1) * std::min(inner, kInner) / std::max<int64_t>(1, g.count));
  parallel_range(tasks, std::max<int64_t>(1, 16384 / mean), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(room);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % blocks * kInner, rest = t / blocks;
      f(rest / g.count, rest % g.count, first, std::min(kInner, inner - first), scratch);
    }
  });
}

inline std::optional<Tensor> contiguous_order(const std::optional<Tensor>& order) {
  return order ? std::optional<Tensor>(as_contiguous(*order)) : order;
}

inline Tensor segment_logsumexp(const Tensor& x, const Tensor& ptr_in,
                                const std::optional<Tensor>& order_in) {
  const Tensor ptr = as_contiguous(ptr_in);
  const std::optional<Tensor> order = contiguous_order(order_in);
  const Segments g = segments_of("segment_logsumexp", x, ptr, order);
  const Tensor from = as_contiguous(as_compute(x));
  const int64_t n = x.size(1), inner = x.size(2);
  const Tensor out = new_tensor(from, {x.size(0), g.count, inner});
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    const T* source = data<T>(from);
    T* to = mutable_data<T>(out);
    over_segments<T>(x, g, [&](int64_t o, int64_t s, int64_t first, int64_t width, auto& scratch) {
      const T* row = source + o * n * inner + first;
      T* value = to + (o * g.count + s) * inner + first;
      if (inner == 1 && gathered_segment<false>(row, g, s, scratch, T(1), value)) return;
      segment_values<T>(row, inner, g, s, width, value);
    });
  });
  return in_type(out, x.scalar_type());
}

// The weights of all entries, times the number of their segment in `scale` (O, S, I) if there is one.
inline Tensor weights_of(const char* op, const std::optional<Tensor>& scale_in, const Tensor& x,
                         const Tensor& ptr_in, const std::optional<Tensor>& order_in) {
  const Tensor ptr = as_contiguous(ptr_in);
  const std::optional<Tensor> order = contiguous_order(order_in);
  const Segments g = segments_of(op, x, ptr, order);
  const Tensor from = as_contiguous(as_compute(x));
  const int64_t n = x.size(1), inner = x.size(2);
  std::optional<Tensor> scale;
  if (scale_in) {
    check_shape(op, "grad", *scale_in, {x.size(0), g.count, inner});
    check_like(op, "grad", *scale_in, x);
    scale = as_contiguous(as_compute(*scale_in));
  }
  const Tensor out = new_tensor(from, {x.size(0), n, inner});
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    const T *source = data<T>(from), *factors = scale ? data<T>(*scale) : nullptr;
    T* to = mutable_data<T>(out);
    over_segments<T>(x, g, [&](int64_t o, int64_t s, int64_t first, int64_t width, auto& scratch) {
      const int64_t at = o * n * inner + first;
      const T* factor = factors != nullptr ? factors + (o * g.count + s) * inner + first : nullptr;
      const T one = factor != nullptr ? *factor : T(1);
      if (inner == 1 && gathered_segment<true>(source + at, g, s, scratch, one, to + at)) return;
      segment_weights<T>(source + at, inner, g, s, width, factor, to + at);
    });
  });
  return in_type(out, x.scalar_type());
}

// With p the probabilities: the mean of the tangent over the segment, and grad p (tangent - mean).
template <class T>
void segment_second(const T* x, const T* tangent, int64_t inner, const Segments& g, int64_t s,
                    int64_t width, const T* grad, T* mean, T* out) {
  T top[kInner], sum[kInner];
  reduce_segment(x, inner, g, s, width, top, sum);
  std::fill_n(mean, width, T(0));
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const int64_t at = g.entry(i) * inner;
    for (int64_t c = 0; c < width; ++c) {
      out[at + c] = share_of(x[at + c], top[c], sum[c]);
      mean[c] += out[at + c] * tangent[at + c];
    }
  }
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const int64_t at = g.entry(i) * inner;
    for (int64_t c = 0; c < width; ++c) out[at + c] *= grad[c] * (tangent[at + c] - mean[c]);
  }
}

inline std::tuple<Tensor, Tensor> segment_logsumexp_double_backward(
    const Tensor& grad_in, const Tensor& x, const Tensor& tangent_in, const Tensor& ptr_in,
    const std::optional<Tensor>& order_in) {
  const char* op = "segment_logsumexp_double_backward";
  const Tensor ptr = as_contiguous(ptr_in);
  const std::optional<Tensor> order = contiguous_order(order_in);
  const Segments g = segments_of(op, x, ptr, order);
  const int64_t n = x.size(1), inner = x.size(2);
  check_shape(op, "grad", grad_in, {x.size(0), g.count, inner});
  check_shape(op, "tangent", tangent_in, x.sizes());
  check_like(op, "grad", grad_in, x);
  check_like(op, "tangent", tangent_in, x);
  const Tensor from = as_contiguous(as_compute(x));
  const Tensor grad = as_contiguous(as_compute(grad_in));
  const Tensor tangent = as_contiguous(as_compute(tangent_in));
  const Tensor mean = new_tensor(from, {x.size(0), g.count, inner});
  const Tensor out = new_tensor(from, {x.size(0), n, inner});
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    over_segments<T>(x, g, [&](int64_t o, int64_t s, int64_t first, int64_t width, auto& scratch) {
      const int64_t at = o * n * inner + first, to = (o * g.count + s) * inner + first;
      const T *source = data<T>(from) + at, *slope = data<T>(tangent) + at;
      T* given = mutable_data<T>(out) + at;
      T* middle = mutable_data<T>(mean) + to;
      const T* factor = data<T>(grad) + to;
      if (inner != 1 || !gathered_segment<true>(source, g, s, scratch, T(1), given)) {
        return segment_second<T>(source, slope, inner, g, s, width, factor, middle, given);
      }
      T total = 0;  // given holds the probabilities
      for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
        total += given[g.entry(i)] * slope[g.entry(i)];
      }
      for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
        given[g.entry(i)] *= *factor * (slope[g.entry(i)] - total);
      }
      *middle = total;
    });
  });
  return {in_type(mean, x.scalar_type()), in_type(out, x.scalar_type())};
}

// The largest entry of a segment for `width` columns, and which entry it is: NaN wins, then the first.
// -1 where that is -inf.
template <class T>
void segment_maxima(const T* x, int64_t inner, const Segments& g, int64_t s, int64_t width, T* top,
                    int64_t* at) {
  std::fill_n(top, width, -kInf<T>);
  std::fill_n(at, width, int64_t{-1});
  for (int64_t i = g.ptr[s]; i < g.ptr[s + 1]; ++i) {
    const int64_t entry = g.entry(i);
    const T* row = x + entry * inner;
    for (int64_t c = 0; c < width; ++c) {
      const bool better = row[c] > top[c] || (row[c] != row[c] && top[c] == top[c]);
      top[c] = better ? row[c] : top[c];
      at[c] = better ? entry : at[c];
    }
  }
}

inline std::tuple<Tensor, Tensor> segment_max(const Tensor& x, const Tensor& ptr_in,
                                              const std::optional<Tensor>& order_in) {
  const Tensor ptr = as_contiguous(ptr_in);
  const std::optional<Tensor> order = contiguous_order(order_in);
  const Segments g = segments_of("segment_max", x, ptr, order);
  const Tensor from = as_contiguous(as_compute(x));
  const int64_t n = x.size(1), inner = x.size(2);
  const Tensor values = new_tensor(from, {x.size(0), g.count, inner});
  const Tensor indices = new_tensor(values, {x.size(0), g.count, inner}, ScalarType::Long);
  with_type(from, [&](auto zero) {
    using T = decltype(zero);
    over_segments<T>(x, g, [&](int64_t o, int64_t s, int64_t first, int64_t width, auto&) {
      const int64_t to = (o * g.count + s) * inner + first;
      segment_maxima<T>(data<T>(from) + o * n * inner + first, inner, g, s, width,
                        mutable_data<T>(values) + to, mutable_data<int64_t>(indices) + to);
    });
  });
  return {in_type(values, x.scalar_type()), indices};
}

inline Tensor segment_softmax(const Tensor& x, const Tensor& ptr,
                              const std::optional<Tensor>& order) {
  return weights_of("segment_softmax", std::nullopt, x, ptr, order);
}

inline Tensor segment_logsumexp_backward(const Tensor& grad, const Tensor& x, const Tensor& ptr,
                                         const std::optional<Tensor>& order) {
  return weights_of("segment_logsumexp_backward", grad, x, ptr, order);
}

}  // namespace sapwood::logsemiring
