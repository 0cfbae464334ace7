// Weights in the order in which the kernels read them: (taps, inputs, outputs), outputs together.
#pragma once

#include "common/parallel.h"
#include "common/scratch.h"
#include "copruned_conv/cpu_arguments.h"

namespace sapwood::copruned_conv {

// Strides of a weight as one direction sees it: for the gradient of the input, in and out change
// places.
struct WeightView {
  int64_t taps, inputs, outputs;
  int64_t tap_row, tap_col, kernel_cols, input, output;

  bool packed() const {
    return output == 1 && input == outputs && tap_col == inputs * outputs &&
           tap_row == kernel_cols * tap_col;
  }
};

inline WeightView weight_view(const Tensor& w, bool depthwise, bool transposed) {
  WeightView view{w.size(2) * w.size(3), w.size(1), w.size(0),   w.stride(2),
                  w.stride(3),           w.size(3), w.stride(1), w.stride(0)};
  if (transposed && !depthwise) {
    std::swap(view.inputs, view.outputs);
    std::swap(view.input, view.output);
  }
  return view;
}

// In the type of the sums. A weight that lies in this order already is used where it lies.
template <class S, class T>
class PackedWeight {
 public:
  PackedWeight(const Tensor& w, const WeightView& view)
      : view_(view), from_(static_cast<const S*>(w.const_data_ptr())) {
    if constexpr (std::is_same_v<S, T>) {
      if (view.packed()) {
        packed_ = from_;
        return;
      }
    }
    own_.resize(static_cast<size_t>(view.taps * view.inputs * view.outputs));
    constexpr int64_t kTogether = 16;  // a line of outputs
    const int64_t lines = (view.outputs + kTogether - 1) / kTogether;
    parallel_range(lines, 1 + 32768 / std::max<int64_t>(1, view.taps * view.inputs * kTogether),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t l = begin; l < end; ++l) {
                       pack(l * kTogether, std::min(view_.outputs, (l + 1) * kTogether));
                     }
                   });
    packed_ = own_.data();
  }
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;

  const T* get() const { return packed_; }

 private:
  void pack(int64_t first, int64_t last) {
    for (int64_t c = 0; c < view_.inputs; ++c) {
      for (int64_t t = 0; t < view_.taps; ++t) {
        const int64_t at = t / view_.kernel_cols * view_.tap_row +
                           t % view_.kernel_cols * view_.tap_col + c * view_.input;
        T* to = own_.data() + (t * view_.inputs + c) * view_.outputs;
        for (int64_t k = first; k < last; ++k) {
          to[k] = static_cast<T>(from_[at + k * view_.output]);
        }
      }
    }
  }

  const WeightView view_;
  const S* from_;
  std::vector<T> own_;
  const T* packed_ = nullptr;
};

}  // namespace sapwood::copruned_conv
