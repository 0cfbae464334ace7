// log_matmul: first and second derivatives.
#pragma once

#include <tuple>

#include "logsemiring/cpu_matmul.h"

namespace sapwood::logsemiring {

// The gradients of one element: contiguous da (m, k) and db (k, n), null where not wanted.
template <class T>
struct Gradients {
  T *a, *b;
};

// Operands of the second order: tangents of da (m, k) and db (k, n), and where q (m, n) goes.
template <class T>
struct Tangents {
  Matrix<T> a, b;
  T* mean;
};

// The tiles of kGroup rows by one strip that the exact kernel has to do.
template <class T>
struct OpenTiles {
  int64_t groups, strips;
  std::vector<int64_t> index;  // (groups, strips): place in the list below, -1 if closed
  std::vector<std::pair<int64_t, int64_t>> list;

  OpenTiles(int64_t m, int64_t n, const std::vector<uint8_t>* open)
      : groups(round_up(m, kGroup) / kGroup), strips(round_up(n, kStrip<T>) / kStrip<T>) {
    index.assign(static_cast<size_t>(groups * strips), -1);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t s = 0; s < strips; ++s) {
        const auto at = static_cast<size_t>(g * strips + s);
        if (open != nullptr && (*open)[at] == 0) continue;
        index[at] = static_cast<int64_t>(list.size());
        list.emplace_back(g, s);
      }
    }
  }
};

// Adds what the open tiles contribute. Passes: weights of every tile; then da by groups of rows and
// db by strips, each in a fixed order on one thread.
template <bool second, class T>
class ExactGradients {
 public:
  ExactGradients(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& grad, int64_t m,
                 int64_t n, int64_t k, const OpenTiles<T>& tiles, const Tangents<T>* tangents)
      : a_(a),
        b_(b),
        grad_(grad),
        m_(m),
        n_(n),
        k_(k),
        tiles_(tiles),
        tangents_(tangents),
        weights_(static_cast<int64_t>(tiles.list.size()) * kSize * (second ? 3 : 2)) {}

  void add(const Gradients<T>& out) {
    weights_.get();  // before the threads start
    weigh();
    if (out.a != nullptr) add_rows(out.a);
    if (out.b != nullptr) add_cols(out.b);
  }

 private:
  static constexpr int64_t kSize = kGroup * kStrip<T>;

  Weights<T> weights(int64_t tile) {
    T* base = weights_.get() + tile * kSize * (second ? 3 : 2);
    return {base, base + kSize, second ? base + 2 * kSize : nullptr};
  }
  int64_t rows(int64_t g) const { return std::min(kGroup, m_ - g * kGroup); }
  int64_t cols(int64_t s) const { return std::min(kStrip<T>, n_ - s * kStrip<T>); }
  int64_t grain() const {
    return std::max<int64_t>(1, kTermsPerTask / (kSize * std::max<int64_t>(k_, 1)));
  }

  Packed<T> pack(ExactScratch<T>& scratch, int64_t g, int64_t s, int64_t l, int64_t depth,
                 bool rows_too, bool cols_too) {
    const Packed<T> x{scratch.a(), scratch.b(), scratch.h(), scratch.g()};
    if (rows_too) {
      SAPWOOD_ISA_CALL(pack_rows(a_, g * kGroup, rows(g), l, depth, x.a));
      if constexpr (second) {
        SAPWOOD_ISA_CALL(pack_rows(tangents_->a, g * kGroup, rows(g), l, depth, x.h));
      }
    }
    if (cols_too) {
      SAPWOOD_ISA_CALL(pack_cols(b_, s * kStrip<T>, cols(s), l, depth, x.b));
      if constexpr (second) {
        SAPWOOD_ISA_CALL(pack_cols(tangents_->b, s * kStrip<T>, cols(s), l, depth, x.g));
        for (int64_t i = 0; i < depth; ++i) {  // lanes that do not exist: finite
          std::fill_n(x.g + i * kStrip<T> + cols(s), kStrip<T> - cols(s), T(0));
        }
      }
    }
    return x;
  }

  void weigh() {
    parallel_range(
        static_cast<int64_t>(tiles_.list.size()), grain(), [&](int64_t begin, int64_t end) {
          ExactScratch<T> scratch(k_);
          for (int64_t t = begin; t < end; ++t) {
            const auto [g, s] = tiles_.list[static_cast<size_t>(t)];
            const Weights<T> w = weights(t);
            SAPWOOD_ISA_CALL(exact_weights(a_, b_, k_, g * kGroup, rows(g), s * kStrip<T>, cols(s),
                                           scratch.a(), scratch.b(), w));
            if constexpr (second) means(scratch, g, s, w);
            for (int64_t r = 0; r < rows(g); ++r) {
              for (int64_t j = 0; j < cols(s); ++j) {
                w.weight[r * kStrip<T> + j] *= grad_.at(g * kGroup + r, s * kStrip<T> + j);
              }
            }
          }
        });
  }

  void means(ExactScratch<T>& scratch, int64_t g, int64_t s, const Weights<T>& w) {
    std::fill_n(w.mean, kSize, T(0));
    for (int64_t l = 0; l < k_; l += kExactDepth) {
      const int64_t depth = std::min(kExactDepth, k_ - l);
      const Packed<T> x = pack(scratch, g, s, l, depth, true, true);
      SAPWOOD_ISA_CALL(exact_means(x, w, depth, rows(g), cols(s), w.mean));
    }
    for (int64_t r = 0; r < rows(g); ++r) {
      std::copy_n(w.mean + r * kStrip<T>, cols(s),
                  tangents_->mean + (g * kGroup + r) * n_ + s * kStrip<T>);
    }
  }

  void add_rows(T* da) {
    parallel_range(tiles_.groups, grain(), [&](int64_t begin, int64_t end) {
      ExactScratch<T> scratch(k_);
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t l = 0; l < k_; l += kExactDepth) {
          const int64_t depth = std::min(kExactDepth, k_ - l);
          bool first = true;
          for (int64_t s = 0; s < tiles_.strips; ++s) {
            const int64_t t = tiles_.index[static_cast<size_t>(g * tiles_.strips + s)];
            if (t < 0) continue;
            const Packed<T> x = pack(scratch, g, s, l, depth, first, true);
            first = false;
            const Weights<T> w = weights(t);
            SAPWOOD_ISA_CALL(exact_grad_rows<second>(x, w, depth, rows(g), cols(s),
                                                     da + g * kGroup * k_ + l, k_));
          }
        }
      }
    });
  }

  void add_cols(T* db) {
    parallel_range(tiles_.strips, grain(), [&](int64_t begin, int64_t end) {
      ExactScratch<T> scratch(k_);
      Scratch<T> sums(std::min(k_, kExactDepth) * kStrip<T>);
      for (int64_t s = begin; s < end; ++s) {
        for (int64_t l = 0; l < k_; l += kExactDepth) {
          const int64_t depth = std::min(kExactDepth, k_ - l);
          bool first = true;
          std::fill_n(sums.get(), depth * kStrip<T>, T(0));
          for (int64_t g = 0; g < tiles_.groups; ++g) {
            const int64_t t = tiles_.index[static_cast<size_t>(g * tiles_.strips + s)];
            if (t < 0) continue;
            const Packed<T> x = pack(scratch, g, s, l, depth, true, first);
            first = false;
            const Weights<T> w = weights(t);
            SAPWOOD_ISA_CALL(exact_grad_cols<second>(x, w, depth, rows(g), cols(s), sums.get()));
          }
          if (first) continue;
          for (int64_t i = 0; i < depth; ++i) {
            T* to = db + (l + i) * n_ + s * kStrip<T>;
            for (int64_t j = 0; j < cols(s); ++j) to[j] += sums.get()[i * kStrip<T> + j];
          }
        }
      }
    });
  }

  const Matrix<T>&a_, &b_, &grad_;
  int64_t m_, n_, k_;
  const OpenTiles<T>& tiles_;
  const Tangents<T>* tangents_;
  Scratch<T> weights_;
};

// A power of two that brings the largest finite |grad| to at most 1 if it is huge: grad / S must not
// overflow.
template <class T>
T grad_scale(const Matrix<T>& grad, int64_t m, int64_t n) {
  T most = 0;
  SAPWOOD_ISA_CALL(largest_finite(grad, m, n, &most));
  return most > T(1 << 20) ? std::exp2(-std::ceil(std::log2(most))) : T(1);
}

template <class T>
void certified_backward(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& grad, int64_t m,
                        int64_t n, int64_t k, const Gradients<T>& out) {
  const Shifts<T> shifts(a, b, m, n, k);
  const Operand<T> rows_of_a{a.data, a.row_stride, a.col_stride, shifts.row_shift, nullptr};
  const Operand<T> cols_of_b{b.data, b.col_stride, b.row_stride, shifts.col_shift, nullptr};
  const T least = certificate<T>(k), scale = grad_scale(grad, m, n);
  const int64_t strips = round_up(n, kStrip<T>) / kStrip<T>, groups = round_up(m, kGroup) / kGroup;
  std::vector<uint8_t> open(static_cast<size_t>(groups * strips), 0);
  Scratch<T> weights(m * n);
  T* w = weights.get();
  packed_product<T>(
      rows_of_a, cols_of_b, m, n, k, true,
      [&](int64_t row, int64_t rows, int64_t col, int64_t cols, const T* sums) {
        for (int64_t s = 0; s < cols; s += kStrip<T>) {
          uint8_t flags[kTileRows / kGroup] = {};
          const Matrix<T> part{grad.data + row * grad.row_stride + (col + s) * grad.col_stride,
                               grad.row_stride, grad.col_stride};
          SAPWOOD_ISA_CALL(weigh_strip(sums + s, shifts.alpha + row, shifts.beta + col + s, least,
                                       rows, std::min(kStrip<T>, cols - s), part, scale,
                                       w + row * n + col + s, n, flags));
          for (int64_t g = 0; g * kGroup < rows; ++g) {
            open[static_cast<size_t>((row / kGroup + g) * strips + (col + s) / kStrip<T>)] =
                flags[g];
          }
        }
      });
  if (out.a != nullptr) {  // E o (W F^T)
    const Operand<T> left{w, n, 1},
        right{b.data, b.row_stride, b.col_stride, nullptr, shifts.col_shift};
    packed_product<T>(left, right, m, k, n, false,
                      [&](int64_t row, int64_t rows, int64_t col, int64_t cols, const T* sums) {
                        const Matrix<T> part{a.data + row * a.row_stride + col * a.col_stride,
                                             a.row_stride, a.col_stride};
                        const T* shift = shifts.row_shift + row;
                        const T* none = nullptr;
                        SAPWOOD_ISA_CALL(scale_tile(sums, part, shift, none, T(1) / scale, rows,
                                                    cols, out.a + row * k + col, k));
                      });
  }
  if (out.b != nullptr) {  // F o (E^T W)
    const Operand<T> left{a.data, a.col_stride, a.row_stride, nullptr, shifts.row_shift},
        right{w, 1, n};
    packed_product<T>(left, right, k, n, m, false,
                      [&](int64_t row, int64_t rows, int64_t col, int64_t cols, const T* sums) {
                        const Matrix<T> part{b.data + row * b.row_stride + col * b.col_stride,
                                             b.row_stride, b.col_stride};
                        const T* shift = shifts.col_shift + col;
                        const T* none = nullptr;
                        SAPWOOD_ISA_CALL(scale_tile(sums, part, none, shift, T(1) / scale, rows,
                                                    cols, out.b + row * n + col, n));
                      });
  }
  const OpenTiles<T> tiles(m, n, &open);
  if (tiles.list.empty()) return;
  ExactGradients<false, T>(a, b, grad, m, n, k, tiles, nullptr).add(out);
}

inline constexpr int64_t kShallow = 64;  // terms of an output whose exponentials are kept

template <class T>
void shallow_backward(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& grad, const Sizes& s,
                      const Gradients<T>& out) {
  ExactScratch<T> scratch(s.k);
  Scratch<T> exponentials(s.k * kGroup * kStrip<T>);
  const Packed<T> room{scratch.a(), scratch.b(), nullptr, nullptr};
  for (int64_t i = 0; i < s.m; i += kGroup) {
    for (int64_t j = 0; j < s.n; j += kStrip<T>) {
      SAPWOOD_ISA_CALL(shallow_gradients(a, b, grad, s.k, s.n, i, std::min(kGroup, s.m - i), j,
                                         std::min(kStrip<T>, s.n - j), room, exponentials.get(),
                                         out.a, out.b));
    }
  }
}

template <class T>
void log_matmul_backward_element(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& grad,
                                 const Sizes& s, bool exact, const Gradients<T>& out) {
  if (!exact && s.terms() > kSmall) {
    return certified_backward(a, b, grad, s.m, s.n, s.k, out);
  }
  if (out.a != nullptr) std::fill_n(out.a, s.m * s.k, T(0));
  if (out.b != nullptr) std::fill_n(out.b, s.k * s.n, T(0));
  if (s.terms() <= kSmall && s.k <= kShallow) return shallow_backward(a, b, grad, s, out);
  const OpenTiles<T> tiles(s.m, s.n, nullptr);
  ExactGradients<false, T>(a, b, grad, s.m, s.n, s.k, tiles, nullptr).add(out);
}

inline void check_grad(const char* op, const Tensor& grad, const Tensor& a, const Sizes& s) {
  check_shape(op, "grad", grad, {s.batch, s.m, s.n});
  check_like(op, "grad", grad, a);
}

inline std::tuple<Tensor, Tensor> log_matmul_backward(const Tensor& grad, const Tensor& a,
                                                      const Tensor& b, bool exact, bool need_a,
                                                      bool need_b) {
  const Sizes s = product_sizes("log_matmul_backward", a, b);
  check_grad("log_matmul_backward", grad, a, s);
  const Tensor left = as_compute(a), right = as_compute(b), g = as_compute(grad);
  Tensor da = new_tensor(left, {0}), db = new_tensor(left, {0});
  if (need_a) da = new_tensor(left, {s.batch, s.m, s.k});
  if (need_b) db = new_tensor(left, {s.batch, s.k, s.n});
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    over_batch(s, [&](int64_t i) {
      const Gradients<T> out{need_a ? mutable_data<T>(da) + i * s.m * s.k : nullptr,
                             need_b ? mutable_data<T>(db) + i * s.k * s.n : nullptr};
      log_matmul_backward_element<T>(matrix<T>(left, i), matrix<T>(right, i), matrix<T>(g, i), s,
                                     exact, out);
    });
  });
  return {in_type(da, a.scalar_type()), in_type(db, a.scalar_type())};
}

// The derivative of <tangent_a, da> + <tangent_b, db> in grad, a and b.
inline std::tuple<Tensor, Tensor, Tensor> log_matmul_double_backward(const Tensor& grad,
                                                                     const Tensor& a,
                                                                     const Tensor& b,
                                                                     const Tensor& tangent_a,
                                                                     const Tensor& tangent_b) {
  const char* op = "log_matmul_double_backward";
  const Sizes s = product_sizes(op, a, b);
  check_grad(op, grad, a, s);
  check_shape(op, "tangent_a", tangent_a, a.sizes());
  check_shape(op, "tangent_b", tangent_b, b.sizes());
  check_like(op, "tangent_a", tangent_a, a);
  check_like(op, "tangent_b", tangent_b, a);
  const Tensor left = as_compute(a), right = as_compute(b), g = as_compute(grad);
  const Tensor ta = as_compute(tangent_a), tb = as_compute(tangent_b);
  const Tensor mean = new_tensor(left, {s.batch, s.m, s.n});
  const Tensor da = new_tensor(left, {s.batch, s.m, s.k});
  const Tensor db = new_tensor(left, {s.batch, s.k, s.n});
  with_type(left, [&](auto zero) {
    using T = decltype(zero);
    over_batch(s, [&](int64_t i) {
      const Gradients<T> out{mutable_data<T>(da) + i * s.m * s.k,
                             mutable_data<T>(db) + i * s.k * s.n};
      std::fill_n(out.a, s.m * s.k, T(0));
      std::fill_n(out.b, s.k * s.n, T(0));
      const Tangents<T> tangents{matrix<T>(ta, i), matrix<T>(tb, i),
                                 mutable_data<T>(mean) + i * s.m * s.n};
      const Matrix<T> x = matrix<T>(left, i), y = matrix<T>(right, i), z = matrix<T>(g, i);
      const OpenTiles<T> tiles(s.m, s.n, nullptr);
      ExactGradients<true, T>(x, y, z, s.m, s.n, s.k, tiles, &tangents).add(out);
    });
  });
  const ScalarType type = a.scalar_type();
  return {in_type(mean, type), in_type(da, type), in_type(db, type)};
}

}  // namespace sapwood::logsemiring
