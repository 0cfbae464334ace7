// The CPU kernels of the family as ops.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <tuple>

#include "common/registry.h"
#include "common/tensor.h"
#include "copruned_conv/cpu_convolve.h"
#include "copruned_conv/cpu_weight_grad.h"
#include "copruned_conv/cpu_weights.h"

namespace sapwood::copruned_conv {
namespace {

// Above this share of the dense work the platform's convolution runs, and the masks follow.
constexpr double kDenseShare = 0.85;

using sapwood::data;

template <class T>
const T* data(const MaybeTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// f(stored, summed): half precision is summed in float.
template <class F>
void with_types(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return f(double{}, double{});
    case ScalarType::Half:
      return f(c10::Half{}, float{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{}, float{});
    default:
      return f(float{}, float{});
  }
}

template <class S, class T>
std::vector<T> converted(const MaybeTensor& t) {
  if (!t) return {};
  const Tensor values = as_contiguous(*t);
  const S* from = data<S>(values);
  return std::vector<T>(from, from + values.numel());
}

struct Masks {
  Masks(const char* op, const Sizes& s, const MaybeTensor& region_in, const MaybeTensor& filters_in,
        const MaybeTensor& inputs_in) {
    check_masks(op, s, region_in, filters_in, inputs_in);
    region = contiguous_mask(region_in);
    filters = contiguous_mask(filters_in);
    inputs = contiguous_mask(inputs_in);
  }

  MaybeTensor region, filters, inputs;

  Region region_of(const Sizes& s) const {
    return {data<bool>(region), s.out_rows, s.out_cols, s.tile};
  }
};

int64_t edge_for(int64_t tile) {
  return std::clamp<int64_t>(tile, 2, kEdge);
}

int64_t channels_of(const std::vector<Block>& blocks) {
  int64_t count = 0;
  for (const Block& block : blocks) count += block.count;
  return count;
}

// Share of the dense products that is left.
double kept_share(const Sizes& s, const Wanted& wanted, const ChannelBlocks& inputs,
                  const ChannelBlocks& outputs) {
  double kept = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    int64_t pixels = 0;
    const uint8_t* map = wanted.row(b, 0);
    for (int64_t p = 0; p < wanted.rows * wanted.cols; ++p) pixels += map[p];
    const int64_t channels = s.depthwise ? 1 : channels_of(inputs[static_cast<size_t>(b)]);
    kept += static_cast<double>(pixels * channels) *
            static_cast<double>(channels_of(outputs[static_cast<size_t>(b)]));
  }
  const double dense = static_cast<double>(s.batch * wanted.rows * wanted.cols) *
                       static_cast<double>((s.depthwise ? 1 : s.channels) * s.filters);
  return dense > 0 ? kept / dense : 0;
}

Tensor dense_convolution(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                         const Options& o) {
  std::array<StableIValue, 7> stack{
      torch::stable::detail::from(x),         torch::stable::detail::from(weight),
      torch::stable::detail::from(bias),      torch::stable::detail::from(o.stride),
      torch::stable::detail::from(o.padding), torch::stable::detail::from(o.dilation),
      torch::stable::detail::from(o.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = channels_last(torch::stable::detail::to<Tensor>(stack[0]));
  // Dimensions of size 1 may have any stride; ours shall not depend on which way ran.
  const int64_t filters = y.size(1), row = filters * y.size(3);
  if (y.stride(1) == 1 && y.stride(3) == filters && y.stride(2) == row &&
      y.stride(0) == row * y.size(2)) {
    return y;
  }
  Tensor own = empty_channels_last(y, {y.size(0), filters, y.size(2), y.size(3)});
  return torch::stable::copy_(own, y);
}

// Activation and residual over a dense result, in place.
template <class S, class T>
void finish_dense(S* y, const S* residual, int64_t count, Activation activation) {
  if (activation == Activation::none && residual == nullptr) return;
  parallel_range(count, 32768, [&](int64_t begin, int64_t end) {
    constexpr int64_t kPart = 1024;
    T part[kPart];
    for (int64_t i = begin; i < end; i += kPart) {
      const int64_t n = std::min(kPart, end - i);
      for (int64_t j = 0; j < n; ++j) part[j] = static_cast<T>(y[i + j]);
      SAPWOOD_ISA_CALL(activate_all(part, n, activation));
      for (int64_t j = 0; j < n; ++j) {
        const T add = residual == nullptr ? T(0) : static_cast<T>(residual[i + j]);
        y[i + j] = static_cast<S>(residual == nullptr ? part[j] : part[j] + add);
      }
    }
  });
}

template <class S, class T>
Tensor forward(const Sizes& s, const Options& o, const Tensor& x, const Tensor& weight,
               const MaybeTensor& bias, const Masks& masks, const MaybeTensor& residual,
               Activation activation) {
  const Wanted wanted = wanted_outputs(masks.region_of(s), s.batch);
  const int64_t width = s.depthwise ? kLine : filters_of_tile<T>();
  const ChannelBlocks outputs =
      channel_blocks(data<bool>(masks.filters), s.group, s.batch, s.filters, width);
  const ChannelBlocks inputs =
      s.depthwise ? outputs
                  : channel_blocks(data<bool>(masks.inputs), s.group, s.batch, s.channels, kLine);
  const double share = kept_share(s, wanted, inputs, outputs);
  Target<S> target{nullptr, data<S>(residual), s.filters};
  if (!s.depthwise && share > kDenseShare && !masks.inputs && std::is_same_v<S, T>) {
    const Tensor y = dense_convolution(x, weight, bias, o);
    target.y = mutable_data<S>(y);
    finish_dense<S, T>(target.y, target.residual, y.numel(), activation);
    fill_skipped(target, wanted, data<bool>(masks.filters), s.group);
    return y;
  }
  const Tensor y = empty_channels_last(x, {s.batch, s.filters, s.out_rows, s.out_cols});
  target.y = mutable_data<S>(y);
  fill_skipped(target, wanted, data<bool>(masks.filters), s.group);
  const PackedWeight<S, T> packed(weight, weight_view(weight, s.depthwise, false));
  const std::vector<T> offset = converted<S, T>(bias);
  const Convolution<S, T> c{.taps = forward_taps(s.geometry),
                            .lattice = {s.out_rows, s.out_cols},
                            .image = {data<S>(x), s.rows, s.cols, s.channels, nullptr, 1},
                            .target = target,
                            .weights = packed.get(),
                            .bias = bias ? offset.data() : nullptr,
                            .activation = activation,
                            .wanted = wanted,
                            .inputs = inputs,
                            .outputs = outputs};
  const double operations = share * s.operations();
  if (s.depthwise) {
    convolve_depthwise(c, edge_for(s.tile), data<bool>(masks.inputs), s.group, operations);
  } else {
    convolve(c, edge_for(s.tile), operations);
  }
  return y;
}

Tensor copruned_conv2d(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias,
                       const MaybeTensor& region, const MaybeTensor& filters,
                       const MaybeTensor& input_filters, const MaybeTensor& residual_in,
                       Ints stride, Ints padding, Ints dilation, int64_t groups, int64_t tile,
                       int64_t filter_group, const std::string& activation_name) {
  const char* op = "copruned_conv2d";
  const Options o{stride, padding, dilation, groups, tile, filter_group};
  const Sizes s(op, x_in, weight, o);
  const Activation activation = parse_activation(op, activation_name);
  const Masks masks(op, s, region, filters, input_filters);
  if (bias) {
    check_shape(op, "bias", *bias, {s.filters});
    check_dtype(op, "bias", *bias, bias->scalar_type() == x_in.scalar_type(), "of input's dtype");
  }
  MaybeTensor residual;
  if (residual_in) {
    check_shape(op, "residual", *residual_in, {s.batch, s.filters, s.out_rows, s.out_cols});
    check_dtype(op, "residual", *residual_in, residual_in->scalar_type() == x_in.scalar_type(),
                "of input's dtype");
    residual = channels_last(*residual_in);
  }
  const Tensor x = channels_last(x_in);
  Tensor y = x;
  with_types(x, [&](auto stored, auto summed) {
    using S = decltype(stored);
    using T = decltype(summed);
    y = forward<S, T>(s, o, x, weight, bias, masks, residual, activation);
  });
  return y;
}

// The gradient of the input, one sum for each parity class of its pixels.
template <class S, class T>
void input_gradient(const Sizes& s, const Tensor& grad, const Tensor& weight, const Masks& masks,
                    const Tensor& out) {
  const Region region = masks.region_of(s);
  const Wanted wanted = read_inputs(region, s.batch, s.geometry, s.rows, s.cols);
  std::vector<uint8_t> both;  // a depthwise channel needs both of its masks
  const bool* on = data<bool>(masks.inputs);
  if (s.depthwise && masks.filters) {
    const bool* filters = data<bool>(masks.filters);
    both.assign(filters, filters + masks.filters->numel());
    for (size_t i = 0; on != nullptr && i < both.size(); ++i) both[i] = both[i] && on[i];
    on = reinterpret_cast<const bool*>(both.data());
  }
  const int64_t width = s.depthwise ? kLine : filters_of_tile<T>();
  const ChannelBlocks outputs = channel_blocks(on, s.group, s.batch, s.channels, width);
  const ChannelBlocks inputs =
      s.depthwise ? outputs
                  : channel_blocks(data<bool>(masks.filters), s.group, s.batch, s.filters, kLine);
  const Target<S> target{mutable_data<S>(out), nullptr, s.channels};
  fill_skipped(target, wanted, on, s.group);
  const PackedWeight<S, T> packed(weight, weight_view(weight, s.depthwise, true));
  const Geometry& g = s.geometry;
  const double operations = s.operations() * kept_share(s, wanted, outputs, inputs);
  for (int64_t y = 0; y < std::min(g.stride[0], s.rows); ++y) {
    for (int64_t x = 0; x < std::min(g.stride[1], s.cols); ++x) {
      const Lattice lattice{ceil_div(s.rows - y, g.stride[0]),
                            ceil_div(s.cols - x, g.stride[1]),
                            y,
                            x,
                            g.stride[0],
                            g.stride[1]};
      const Convolution<S, T> c{
          .taps = gradient_taps(g, y, x),
          .lattice = lattice,
          .image = {data<S>(grad), s.out_rows, s.out_cols, s.filters, region.mask, s.tile},
          .tiles = region.tile_rows() * region.tile_cols(),
          .target = target,
          .weights = packed.get(),
          .bias = nullptr,
          .wanted = wanted,
          .inputs = inputs,
          .outputs = outputs};
      if (s.depthwise) {
        convolve_depthwise(c, kEdge, nullptr, s.group, operations);
      } else {
        convolve(c, kEdge, operations);
      }
    }
  }
}

template <class S, class T>
void parameter_gradients(const Sizes& s, const Tensor& grad, const Tensor& x, const Masks& masks,
                         const Tensor* weight_out, const Tensor* bias_out) {
  const Wanted wanted = wanted_outputs(masks.region_of(s), s.batch);
  const WeightGradient<S, T> g{
      .taps = forward_taps(s.geometry),
      .image = {data<S>(x), s.rows, s.cols, s.channels, nullptr, 1},
      .slopes = data<S>(grad),
      .filters = s.filters,
      .wanted = wanted,
      .masks = {data<bool>(masks.filters), data<bool>(masks.inputs), s.group},
      .out = weight_out == nullptr ? nullptr : mutable_data<S>(*weight_out)};
  if (weight_out != nullptr && s.depthwise) {
    weight_gradient_depthwise(g, edge_for(s.tile), s.operations());
  } else if (weight_out != nullptr) {
    weight_gradient(g, edge_for(s.tile), s.operations());
  }
  if (bias_out != nullptr) bias_gradient(g, mutable_data<S>(*bias_out));
}

std::tuple<Tensor, Tensor, Tensor> copruned_conv2d_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& weight, const MaybeTensor& region,
    const MaybeTensor& filters, const MaybeTensor& input_filters, Ints stride, Ints padding,
    Ints dilation, int64_t groups, int64_t tile, int64_t filter_group, bool need_x,
    bool need_weight, bool need_bias) {
  const char* op = "copruned_conv2d_backward";
  const Options o{stride, padding, dilation, groups, tile, filter_group};
  const Sizes s(op, x_in, weight, o);
  check_shape(op, "grad", grad_in, {s.batch, s.filters, s.out_rows, s.out_cols});
  check_dtype(op, "grad", grad_in, grad_in.scalar_type() == x_in.scalar_type(), "of input's dtype");
  const Masks masks(op, s, region, filters, input_filters);
  const Tensor grad = channels_last(grad_in);
  const Tensor x = need_weight ? channels_last(x_in) : x_in;
  const Tensor gx =
      need_x ? empty_channels_last(x, {s.batch, s.channels, s.rows, s.cols}) : new_tensor(x, {0});
  const Tensor gw = new_tensor(
      x, need_weight ? Ints{s.filters, weight.size(1), weight.size(2), weight.size(3)} : Ints{0});
  const Tensor gb = new_tensor(x, {need_bias ? s.filters : 0});
  with_types(x, [&](auto stored, auto summed) {
    using S = decltype(stored);
    using T = decltype(summed);
    if (need_x) input_gradient<S, T>(s, grad, weight, masks, gx);
    parameter_gradients<S, T>(s, grad, x, masks, need_weight ? &gw : nullptr,
                              need_bias ? &gb : nullptr);
  });
  return {gx, gw, gb};
}

// Numbers of the tiles that are on, in ascending order, then -1; and how many there are.
std::tuple<Tensor, Tensor> tile_list(const Tensor& mask_in) {
  const char* op = "tile_list";
  check_dtype(op, "mask", mask_in, mask_in.scalar_type() == ScalarType::Bool, "bool");
  STD_TORCH_CHECK(mask_in.numel() <= std::numeric_limits<int32_t>::max(),
                  "sapwood.tile_list: mask must have fewer than 2^31 entries, got ",
                  mask_in.numel());
  const Tensor mask = as_contiguous(mask_in);
  const Tensor items = new_tensor(mask, {mask.numel()}, ScalarType::Int);
  const Tensor count = new_tensor(mask, {}, ScalarType::Int);
  int32_t* to = mutable_data<int32_t>(items);
  const bool* on = data<bool>(mask);
  int32_t found = 0;
  for (int64_t i = 0; i < mask.numel(); ++i) {
    if (on[i]) to[found++] = static_cast<int32_t>(i);
  }
  std::fill(to + found, to + mask.numel(), -1);
  *mutable_data<int32_t>(count) = found;
  return {items, count};
}

}  // namespace
}  // namespace sapwood::copruned_conv

SAPWOOD_CPU_IMPL(m) {
  using namespace sapwood::copruned_conv;
  m.impl("copruned_conv2d", TORCH_BOX(&copruned_conv2d));
  m.impl("copruned_conv2d_backward", TORCH_BOX(&copruned_conv2d_backward));
  m.impl("tile_list", TORCH_BOX(&tile_list));
}
