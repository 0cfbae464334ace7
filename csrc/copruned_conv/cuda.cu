// copruned_conv on CUDA: tensors in, launches of the kernels in cuda_*.cuh, registration. Nothing
// waits for the device: lists of kept tiles have room for all tiles, their lengths stay there.
#include <tuple>

#include "common/cuda.h"
#include "common/cuda_tensor.h"
#include "common/registry.h"
#include "copruned_conv/cpu_arguments.h"
#include "copruned_conv/cuda_weight_grad.cuh"

namespace sapwood::copruned_conv::device {
namespace {

constexpr int64_t kGradientEdge = 8;  // of the tiles of the input's gradient

template <class T>
const T* input(const MaybeTensor& t) {
  return t ? sapwood::input<T>(*t) : nullptr;
}
using sapwood::input;

struct Masks {
  Masks(const char* op, const Sizes& s, const Tensor& x, const MaybeTensor& region_in,
        const MaybeTensor& filters_in, const MaybeTensor& inputs_in) {
    check_masks(op, s, region_in, filters_in, inputs_in);
    const auto own = [&](const char* name, const MaybeTensor& mask) {
      if (mask) check_device(op, name, *mask, "input", x);
      return contiguous_mask(mask);
    };
    region = own("region", region_in);
    filters = own("filters", filters_in);
    inputs = own("input_filters", inputs_in);
  }

  MaybeTensor region, filters, inputs;
};

// The kept tiles of every sample, with the memory they lie in.
struct Tiles {
  MaybeTensor items, counts;
  int64_t capacity, cols, edge;

  // mask (batch, rows, cols) or null for all tiles.
  Tiles(const MaybeTensor& mask, int64_t batch, int64_t rows, int64_t cols, int64_t edge,
        Stream stream)
      : capacity(rows * cols), cols(cols), edge(edge) {
    if (!mask) return;
    items = new_tensor(*mask, {batch, capacity}, ScalarType::Int);
    counts = new_tensor(*mask, {batch}, ScalarType::Int);
    launch_compact(sapwood::input<bool>(*mask), batch, capacity, output<int32_t>(*items),
                   output<int32_t>(*counts), stream);
  }

  template <class S>
  void into(Conv<S>& c) const {
    c.items = input<int32_t>(items);
    c.counts = input<int32_t>(counts);
    c.capacity = capacity;
    c.tile_cols = cols;
    c.edge = edge;
  }
};

template <class S>
Weights<S> weights_of(const Tensor& w, bool transposed) {
  const int64_t out = transposed ? w.stride(1) : w.stride(0);
  const int64_t in = transposed ? w.stride(0) : w.stride(1);
  return {input<S>(w), out, in, w.stride(2), w.stride(3), static_cast<int>(w.size(3))};
}

// The forward pass as far as x, masks and sizes go.
template <class S>
Conv<S> forward_conv(const Sizes& s, const Tensor& x, const Masks& masks, const Tiles& tiles) {
  Conv<S> c{};
  c.x = input<S>(x);
  c.rows = s.rows;
  c.cols = s.cols;
  c.channels = s.channels;
  c.source_tile = 1;
  c.batch = s.batch;
  c.out_rows = s.out_rows;
  c.out_cols = s.out_cols;
  c.filters = s.filters;
  c.filters_on = input<bool>(masks.filters);
  c.inputs_on = input<bool>(masks.inputs);
  c.group = s.group;
  c.lattice = {s.out_rows, s.out_cols};
  c.taps = forward_taps(s.geometry);
  tiles.into(c);
  return c;
}

void check_like(const char* op, const char* name, const MaybeTensor& t, const Tensor& x,
                const Ints& shape) {
  if (!t) return;
  check_shape(op, name, *t, shape);
  check_dtype(op, name, *t, t->scalar_type() == x.scalar_type(), "of input's dtype");
  check_device(op, name, *t, "input", x);
}

Tensor copruned_conv2d(const Tensor& x_in, const Tensor& weight, const MaybeTensor& bias_in,
                       const MaybeTensor& region, const MaybeTensor& filters,
                       const MaybeTensor& input_filters, const MaybeTensor& residual_in,
                       Ints stride, Ints padding, Ints dilation, int64_t groups, int64_t tile,
                       int64_t filter_group, const std::string& activation_name) {
  const char* op = "copruned_conv2d";
  const Options o{stride, padding, dilation, groups, tile, filter_group};
  const Sizes s(op, x_in, weight, o);
  const Activation activation = parse_activation(op, activation_name);
  const Ints shape{s.batch, s.filters, s.out_rows, s.out_cols};
  check_device(op, "weight", weight, "input", x_in);
  check_like(op, "bias", bias_in, x_in, {s.filters});
  check_like(op, "residual", residual_in, x_in, shape);
  const DeviceScope scope(x_in);
  const Stream stream = current_stream(x_in);
  const Masks masks(op, s, x_in, region, filters, input_filters);
  const Tensor x = channels_last(x_in), y = empty_channels_last(x, shape);
  MaybeTensor bias, residual;
  if (bias_in) bias = as_contiguous(*bias_in);
  if (residual_in) residual = channels_last(*residual_in);
  const Tiles tiles(masks.region, s.batch, s.tile_rows(), s.tile_cols(), s.tile, stream);
  dispatch_float(op, "input", x, [&](auto type) {
    using S = typename decltype(type)::type;
    Conv<S> c = forward_conv<S>(s, x, masks, tiles);
    c.weights = weights_of<S>(weight, false);
    c.bias = input<S>(bias);
    c.residual = input<S>(residual);
    c.y = output<S>(y);
    c.activation = activation;
    const Kept kept{input<bool>(masks.region),
                    c.filters_on,
                    s.batch,
                    s.out_rows,
                    s.out_cols,
                    s.filters,
                    s.tile,
                    s.group};
    launch_fill(kept, c.residual, c.y, stream);
    launch_conv(c, s.depthwise, stream);
  });
  return y;
}

// The tiles of the input that an output tile which is on reads; none without a region mask.
MaybeTensor read_tiles(const Sizes& s, const Masks& masks, Stream stream) {
  if (!masks.region) return std::nullopt;
  const int64_t rows = ceil_div(s.rows, kGradientEdge), cols = ceil_div(s.cols, kGradientEdge);
  const Tensor read = new_tensor(*masks.region, {s.batch, rows, cols});
  const ReadShape shape{s.batch, s.tile_rows(), s.tile_cols(), s.out_rows,    s.out_cols,
                        s.tile,  rows,          cols,          kGradientEdge, s.geometry};
  launch_read(input<bool>(*masks.region), shape, output<bool>(read), stream);
  return read;
}

// Tiles of the lattice of one parity class in which some pixel may have a gradient.
Tiles class_tiles(const Sizes& s, const MaybeTensor& read, const Lattice& lattice, Stream stream) {
  const int64_t rows = ceil_div(lattice.rows, kGradientEdge);
  const int64_t cols = ceil_div(lattice.cols, kGradientEdge);
  const bool whole = lattice.spread_y == 1 && lattice.spread_x == 1;
  return Tiles(whole ? read : std::nullopt, s.batch, rows, cols, kGradientEdge, stream);
}

template <class S>
void input_gradient(const Sizes& s, const Tensor& grad, const Tensor& weight, const Masks& masks,
                    const Tensor& out, Stream stream) {
  const Geometry& g = s.geometry;
  const bool strided = g.stride[0] > 1 || g.stride[1] > 1;
  const MaybeTensor read = strided ? std::nullopt : read_tiles(s, masks, stream);
  const Kept kept{input<bool>(read),
                  input<bool>(masks.inputs),
                  s.batch,
                  s.rows,
                  s.cols,
                  s.channels,
                  kGradientEdge,
                  s.group};
  launch_fill<S>(kept, nullptr, output<S>(out), stream);
  for (int64_t y = 0; y < std::min(g.stride[0], s.rows); ++y) {
    for (int64_t x = 0; x < std::min(g.stride[1], s.cols); ++x) {
      Conv<S> c{};
      c.x = input<S>(grad);
      c.rows = s.out_rows;
      c.cols = s.out_cols;
      c.channels = s.filters;
      c.source_region = input<bool>(masks.region);
      c.source_tile = s.tile;
      c.weights = weights_of<S>(weight, !s.depthwise);
      c.y = output<S>(out);
      c.batch = s.batch;
      c.out_rows = s.rows;
      c.out_cols = s.cols;
      c.filters = s.channels;
      c.filters_on = input<bool>(masks.inputs);
      c.inputs_on = input<bool>(masks.filters);
      c.group = s.group;
      c.lattice = {ceil_div(s.rows - y, g.stride[0]),
                   ceil_div(s.cols - x, g.stride[1]),
                   y,
                   x,
                   g.stride[0],
                   g.stride[1]};
      c.taps = gradient_taps(g, y, x);
      const Tiles tiles = class_tiles(s, read, c.lattice, stream);
      tiles.into(c);
      launch_conv(c, s.depthwise, stream);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> copruned_conv2d_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& weight, const MaybeTensor& region,
    const MaybeTensor& filters, const MaybeTensor& input_filters, Ints stride, Ints padding,
    Ints dilation, int64_t groups, int64_t tile, int64_t filter_group, bool need_x,
    bool need_weight, bool need_bias) {
  const char* op = "copruned_conv2d_backward";
  const Options o{stride, padding, dilation, groups, tile, filter_group};
  const Sizes s(op, x_in, weight, o);
  check_device(op, "weight", weight, "input", x_in);
  check_like(op, "grad", grad_in, x_in, {s.batch, s.filters, s.out_rows, s.out_cols});
  const DeviceScope scope(x_in);
  const Stream stream = current_stream(x_in);
  const Masks masks(op, s, x_in, region, filters, input_filters);
  const Tensor grad = channels_last(grad_in), x = channels_last(x_in);
  const Tensor gx =
      need_x ? empty_channels_last(x, {s.batch, s.channels, s.rows, s.cols}) : new_tensor(x, {0});
  const Tensor gw = new_tensor(
      x, need_weight ? Ints{s.filters, weight.size(1), weight.size(2), weight.size(3)} : Ints{0});
  const Tensor gb = new_tensor(x, {need_bias ? s.filters : 0});
  const Tiles tiles(masks.region, s.batch, s.tile_rows(), s.tile_cols(), s.tile, stream);
  dispatch_float(op, "input", x, [&](auto type) {
    using S = typename decltype(type)::type;
    if (need_x) input_gradient<S>(s, grad, weight, masks, gx, stream);
    const WeightGrad<S> g{forward_conv<S>(s, x, masks, tiles), input<S>(grad),
                          need_weight ? output<S>(gw) : nullptr,
                          need_bias ? output<S>(gb) : nullptr};
    launch_weight_grad(g, s.depthwise, stream);
  });
  return {gx, gw, gb};
}

std::tuple<Tensor, Tensor> tile_list(const Tensor& mask_in) {
  const char* op = "tile_list";
  check_dtype(op, "mask", mask_in, mask_in.scalar_type() == ScalarType::Bool, "bool");
  STD_TORCH_CHECK(mask_in.numel() <= std::numeric_limits<int32_t>::max(),
                  "sapwood.tile_list: mask must have fewer than 2^31 entries, got ",
                  mask_in.numel());
  const DeviceScope scope(mask_in);
  const Stream stream = current_stream(mask_in);
  const Tensor mask = as_contiguous(mask_in);
  const Tensor items = new_tensor(mask, {mask.numel()}, ScalarType::Int);
  const Tensor count = new_tensor(mask, {}, ScalarType::Int);
  launch_compact(input<bool>(mask), 1, mask.numel(), output<int32_t>(items), output<int32_t>(count),
                 stream);
  return {items, count};
}

}  // namespace
}  // namespace sapwood::copruned_conv::device

SAPWOOD_CUDA_IMPL(m) {
  namespace ops = sapwood::copruned_conv::device;
  m.impl("copruned_conv2d", TORCH_BOX(&ops::copruned_conv2d));
  m.impl("copruned_conv2d_backward", TORCH_BOX(&ops::copruned_conv2d_backward));
  m.impl("tile_list", TORCH_BOX(&ops::tile_list));
}
