// Arguments as the ops get them, for CPU and GPU: checked where memory safety needs it, sizes derived.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "copruned_conv/problem.h"

namespace sapwood::copruned_conv {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

inline Activation parse_activation(const char* op, const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "silu") return Activation::silu;
  STD_TORCH_CHECK(name == "leaky_relu", "sapwood.", op,
                  ": activation must be one of none, relu, gelu, silu, leaky_relu, got ", name);
  return Activation::leaky_relu;
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  check_dtype(op, argument, t,
              type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                  type == ScalarType::BFloat16,
              "float32, float64, float16 or bfloat16");
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

struct Options {
  Ints stride, padding, dilation;
  int64_t groups, tile, filter_group;
};

// Sizes of one call: input (batch, channels, rows, cols), output (batch, filters, out_rows, out_cols).
struct Sizes {
  Sizes(const char* op, const Tensor& x, const Tensor& weight, const Options& o) {
    check_dim(op, "input", x, 4);
    check_dim(op, "weight", weight, 4);
    check_floating(op, "input", x);
    check_dtype(op, "weight", weight, weight.scalar_type() == x.scalar_type(), "of input's dtype");
    batch = x.size(0);
    channels = x.size(1);
    rows = x.size(2);
    cols = x.size(3);
    filters = weight.size(0);
    depthwise = o.groups != 1;
    STD_TORCH_CHECK(!depthwise || (o.groups == channels && filters == channels), "sapwood.", op,
                    ": groups must be 1 or the number of channels and filters, got ", o.groups);
    check_shape(op, "weight", weight,
                {filters, depthwise ? 1 : channels, weight.size(2), weight.size(3)});
    for (const Ints* values : {&o.stride, &o.padding, &o.dilation}) {
      STD_TORCH_CHECK(values->size() == 2, "sapwood.", op,
                      ": stride, padding and dilation must have 2 entries");
    }
    for (int axis = 0; axis < 2; ++axis) {
      const auto at = static_cast<size_t>(axis);
      geometry.kernel[axis] = weight.size(2 + axis);
      geometry.stride[axis] = o.stride[at];
      geometry.padding[axis] = o.padding[at];
      geometry.dilation[axis] = o.dilation[at];
      constexpr int64_t kMostStep = int64_t{1} << 24;  // times any kernel it is below 2^31
      STD_TORCH_CHECK(
          o.stride[at] < kMostStep && o.padding[at] < kMostStep && o.dilation[at] < kMostStep,
          "sapwood.", op, ": stride, padding and dilation must be below 2^24");
      STD_TORCH_CHECK(o.stride[at] >= 1 && o.dilation[at] >= 1 && o.padding[at] >= 0, "sapwood.",
                      op, ": stride and dilation must be at least 1 and padding at least 0");
    }
    STD_TORCH_CHECK(
        geometry.kernel[0] >= 1 && geometry.kernel[1] >= 1 && geometry.taps() <= kMaxTaps,
        "sapwood.", op, ": weight must have 1 to ", kMaxTaps, " taps, got ", geometry.taps());
    STD_TORCH_CHECK(o.tile >= 1 && o.filter_group >= 8, "sapwood.", op,
                    ": tile must be at least 1 and filter_group at least 8");
    out_rows = geometry.output_size(0, rows);
    out_cols = geometry.output_size(1, cols);
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    STD_TORCH_CHECK(rows * cols <= kMost && out_rows * out_cols <= kMost, "sapwood.", op,
                    ": input must have fewer than 2^31 pixels");
    tile = o.tile;
    group = o.filter_group;
  }

  int64_t batch, channels, rows, cols, filters, out_rows, out_cols, tile, group;
  bool depthwise;
  Geometry geometry;

  int64_t tile_rows() const { return ceil_div(out_rows, tile); }
  int64_t tile_cols() const { return ceil_div(out_cols, tile); }
  double operations() const {  // of the dense convolution, two for each product
    const int64_t inputs = depthwise ? 1 : channels;
    return 2.0 * static_cast<double>(batch * out_rows * out_cols * filters) *
           static_cast<double>(inputs * geometry.taps());
  }
};

inline void check_masks(const char* op, const Sizes& s, const MaybeTensor& region,
                        const MaybeTensor& filters, const MaybeTensor& inputs) {
  const auto check = [&](const char* name, const MaybeTensor& mask, const Ints& shape) {
    if (!mask) return;
    check_dtype(op, name, *mask, mask->scalar_type() == ScalarType::Bool, "bool");
    check_shape(op, name, *mask, shape);
  };
  check("region", region, {s.batch, s.tile_rows(), s.tile_cols()});
  STD_TORCH_CHECK(!filters || s.filters % s.group == 0, "sapwood.", op,
                  ": filter_group must divide the filters ", s.filters, ", got ", s.group);
  check("filters", filters, {s.batch, s.filters / s.group});
  STD_TORCH_CHECK(!inputs || s.channels % s.group == 0, "sapwood.", op,
                  ": filter_group must divide the channels ", s.channels, ", got ", s.group);
  check("input_filters", inputs, {s.batch, s.channels / s.group});
}

inline Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, MemoryFormat::ChannelsLast);
}

inline MaybeTensor contiguous_mask(const MaybeTensor& mask) {
  if (!mask || mask->is_contiguous()) return mask;
  return as_contiguous(*mask);
}

inline Tensor empty_channels_last(const Tensor& like, const Ints& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

}  // namespace sapwood::copruned_conv
