// The device kernels of copruned_conv against sums in double. It needs no torch library, so
// ThreadSanitizer can watch every kernel. Some launches have one block for all the work, as where
// there is more of it than a grid may have blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "copruned_conv/cuda_weight_grad.cuh"
#include "expect.h"

namespace {

using namespace sapwood::copruned_conv;
using namespace sapwood::copruned_conv::device;

constexpr int64_t kGroup = 8;

bool near(double actual, double expected) {
  return std::abs(actual - expected) <= 1e-4 * (1 + std::abs(expected));
}

// Bools of one byte each, which std::vector<bool> does not have.
struct Bits {
  explicit Bits(int64_t count, double density = 1.0, unsigned seed = 1)
      : count(count), data(std::make_unique<bool[]>(static_cast<size_t>(count))) {
    std::mt19937 random(seed);
    std::bernoulli_distribution on(density);
    for (int64_t i = 0; i < count; ++i) data[static_cast<size_t>(i)] = on(random);
  }
  bool operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }

  int64_t count;
  std::unique_ptr<bool[]> data;
};

void check_compact(int64_t batch, int64_t length) {
  const Bits mask(batch * length, 0.4);
  std::vector<int32_t> items(static_cast<size_t>(batch * length), 7), counts(batch, -7), wanted;
  launch_compact(mask.data.get(), batch, length, items.data(), counts.data(), nullptr);
  for (int64_t b = 0; b < batch; ++b) {
    const size_t before = wanted.size();
    for (int64_t i = 0; i < length; ++i) {
      if (mask[b * length + i]) wanted.push_back(static_cast<int32_t>(i));
    }
    expect(counts[static_cast<size_t>(b)] == static_cast<int32_t>(wanted.size() - before),
           "count of " + std::to_string(length));
    wanted.resize(static_cast<size_t>((b + 1) * length), -1);
  }
  expect(items == wanted, "list of " + std::to_string(length));
}

// A convolution of an image of 9 x 7 pixels, whole or with masks of tiles, filters and inputs.
struct Problem {
  static constexpr int64_t batch = 2, rows = 9, cols = 7, tile = 4;

  Problem(int64_t channels, int64_t filters, Geometry g, bool depthwise, bool masked)
      : channels(channels),
        filters(filters),
        inputs_of_filter(depthwise ? 1 : channels),
        geometry(g),
        masked(masked),
        out_rows(g.output_size(0, rows)),
        out_cols(g.output_size(1, cols)),
        tile_rows((out_rows + tile - 1) / tile),
        tile_cols((out_cols + tile - 1) / tile),
        region(batch * tile_rows * tile_cols, masked ? 0.6 : 1.0, 3),
        filters_on(batch * filters / kGroup, masked ? 0.6 : 1.0, 4),
        inputs_on(batch * channels / kGroup, masked ? 0.6 : 1.0, 5),
        x(normal(batch * rows * cols * channels, 1)),
        w(normal(filters * inputs_of_filter * g.taps(), 2)),
        bias(normal(filters, 3)),
        slopes(normal(batch * out_rows * out_cols * filters, 4)),
        residual(normal(batch * out_rows * out_cols * filters, 5)),
        items(static_cast<size_t>(region.count)),
        counts(batch) {
    launch_compact(region.data.get(), batch, tile_rows * tile_cols, items.data(), counts.data(),
                   nullptr);
  }

  std::string name(const char* what) const {
    return std::string(what) + " " + std::to_string(channels) + " to " + std::to_string(filters) +
           (inputs_of_filter == 1 ? " depthwise" : "") + (masked ? " masked" : "");
  }
  bool tile_on(int64_t b, int64_t i, int64_t j) const {
    return region[(b * tile_rows + i / tile) * tile_cols + j / tile];
  }
  bool filter_on(int64_t b, int64_t k) const {
    return filters_on[b * (filters / kGroup) + k / kGroup];
  }
  bool input_on(int64_t b, int64_t c) const {
    return inputs_on[b * (channels / kGroup) + c / kGroup];
  }
  int64_t place(int64_t b, int64_t i, int64_t j, int64_t k) const {
    return ((b * out_rows + i) * out_cols + j) * filters + k;
  }
  // f(input, weight) with the flat places of every product that output (b, i, j, k) sums.
  void each_product(int64_t b, int64_t i, int64_t j, int64_t k,
                    const std::function<void(int64_t, int64_t)>& f) const {
    const int64_t first = inputs_of_filter == 1 ? k : 0;
    for (int64_t c = first; c < first + inputs_of_filter; ++c) {
      for (int64_t t = 0; input_on(b, c) && t < geometry.taps(); ++t) {
        const int64_t row = i * geometry.stride[0] - geometry.padding[0] +
                            t / geometry.kernel[1] * geometry.dilation[0];
        const int64_t col = j * geometry.stride[1] - geometry.padding[1] +
                            t % geometry.kernel[1] * geometry.dilation[1];
        if (row < 0 || row >= rows || col < 0 || col >= cols) continue;
        f(((b * rows + row) * cols + col) * channels + c,
          (k * inputs_of_filter + c - first) * geometry.taps() + t);
      }
    }
  }
  Conv<float> conv(float* y) const {
    Conv<float> c{};
    c.x = x.data();
    c.rows = rows;
    c.cols = cols;
    c.channels = channels;
    c.source_tile = 1;
    c.weights = {w.data(), inputs_of_filter * geometry.taps(),  geometry.taps(), geometry.kernel[1],
                 1,        static_cast<int>(geometry.kernel[1])};
    c.bias = bias.data();
    c.residual = residual.data();
    c.y = y;
    c.batch = batch;
    c.out_rows = out_rows;
    c.out_cols = out_cols;
    c.filters = filters;
    c.filters_on = masked ? filters_on.data.get() : nullptr;
    c.inputs_on = masked ? inputs_on.data.get() : nullptr;
    c.group = kGroup;
    c.items = masked ? items.data() : nullptr;
    c.counts = masked ? counts.data() : nullptr;
    c.capacity = tile_rows * tile_cols;
    c.tile_cols = tile_cols;
    c.edge = tile;
    c.lattice = {out_rows, out_cols};
    c.taps = forward_taps(geometry);
    c.activation = sapwood::copruned_conv::Activation::relu;
    return c;
  }

  int64_t channels, filters, inputs_of_filter;
  Geometry geometry;
  bool masked;
  int64_t out_rows, out_cols, tile_rows, tile_cols;
  Bits region, filters_on, inputs_on;
  std::vector<float> x, w, bias, slopes, residual;
  std::vector<int32_t> items, counts;
};

void check_outputs(const Problem& p, bool one_block) {
  const bool depthwise = p.inputs_of_filter == 1;
  std::vector<float> y(p.slopes.size(), NAN);
  const Conv<float> c = p.conv(y.data());
  const Kept kept{p.masked ? p.region.data.get() : nullptr,
                  p.masked ? p.filters_on.data.get() : nullptr,
                  p.batch,
                  p.out_rows,
                  p.out_cols,
                  p.filters,
                  p.tile,
                  kGroup};
  launch_fill(kept, c.residual, c.y, nullptr);
  if (!one_block) {
    launch_conv(c, depthwise, nullptr);
  } else if (depthwise) {
    SAPWOOD_LAUNCH(depthwise_kernel<float>, 1, kThreads, 0, nullptr, c);
  } else {
    SAPWOOD_LAUNCH(conv_kernel<float>, 1, kThreads, 0, nullptr, c);
  }
  bool right = true;
  for (int64_t e = 0; e < static_cast<int64_t>(y.size()); ++e) {
    const int64_t k = e % p.filters, j = e / p.filters % p.out_cols;
    const int64_t i = e / p.filters / p.out_cols % p.out_rows;
    const int64_t b = e / (p.filters * p.out_cols * p.out_rows);
    double wanted = 0;
    if (p.tile_on(b, i, j) && p.filter_on(b, k)) {
      double sum = p.bias[k];
      p.each_product(b, i, j, k, [&](int64_t input, int64_t weight) {
        sum += static_cast<double>(p.x[input]) * p.w[weight];
      });
      wanted = std::max(sum, 0.0);
    }
    right &= near(y[e], wanted + p.residual[e]);
  }
  expect(right, p.name("outputs"));
}

void check_gradients(const Problem& p, bool one_block) {
  std::vector<float> weight(p.w.size(), NAN), bias(p.bias.size(), NAN);
  const WeightGrad<float> g{p.conv(nullptr), p.slopes.data(), weight.data(), bias.data()};
  const bool depthwise = p.inputs_of_filter == 1;
  if (!one_block) {
    launch_weight_grad(g, depthwise, nullptr);
  } else {
    auto kernel = depthwise ? depthwise_weight_kernel<float> : weight_kernel<float>;
    SAPWOOD_LAUNCH(kernel, 1, kThreads, 0, nullptr, g);
    SAPWOOD_LAUNCH(bias_kernel<float>, 1, kThreads, 0, nullptr, g);
  }
  std::vector<double> wanted(weight.size(), 0.0), wanted_bias(bias.size(), 0.0);
  for (int64_t e = 0; e < static_cast<int64_t>(p.slopes.size()); ++e) {
    const int64_t k = e % p.filters, j = e / p.filters % p.out_cols;
    const int64_t i = e / p.filters / p.out_cols % p.out_rows;
    const int64_t b = e / (p.filters * p.out_cols * p.out_rows);
    if (!p.tile_on(b, i, j) || !p.filter_on(b, k)) continue;
    wanted_bias[k] += p.slopes[e];
    p.each_product(b, i, j, k, [&](int64_t input, int64_t at) {
      wanted[at] += static_cast<double>(p.slopes[e]) * p.x[input];
    });
  }
  bool right = true;
  for (size_t i = 0; i < wanted.size(); ++i) right &= near(weight[i], wanted[i]);
  expect(right, p.name("weights' gradient"));
  right = true;
  for (size_t i = 0; i < wanted_bias.size(); ++i) right &= near(bias[i], wanted_bias[i]);
  expect(right, p.name("bias's gradient"));
}

// A tile of the input is read where some output pixel of a tile that is on reads a pixel of it.
void check_read(const Problem& p) {
  constexpr int64_t edge = 2;
  const int64_t rows = (p.rows + edge - 1) / edge, cols = (p.cols + edge - 1) / edge;
  const ReadShape shape{p.batch, p.tile_rows, p.tile_cols, p.out_rows, p.out_cols,
                        p.tile,  rows,        cols,        edge,       p.geometry};
  const Bits read(p.batch * rows * cols, 0.5, 9);
  launch_read(p.region.data.get(), shape, read.data.get(), nullptr);
  std::vector<char> needed(static_cast<size_t>(read.count));
  for (int64_t e = 0; e < p.batch * p.out_rows * p.out_cols; ++e) {
    const int64_t b = e / (p.out_rows * p.out_cols);
    const int64_t i = e / p.out_cols % p.out_rows, j = e % p.out_cols;
    if (!p.tile_on(b, i, j)) continue;
    for (const int64_t dy : {-1, 0, 1}) {
      for (const int64_t dx : {-1, 0, 1}) {  // 3 x 3 taps
        const int64_t row = i + dy, col = j + dx;
        if (row < 0 || row >= p.rows || col < 0 || col >= p.cols) continue;
        needed[(b * rows + row / edge) * cols + col / edge] = 1;
      }
    }
  }
  bool right = true;
  for (int64_t i = 0; i < read.count; ++i) right &= read[i] || !needed[i];
  expect(right, p.name("tiles read"));
}

}  // namespace

int main() {
  check_compact(2, 300);
  check_compact(3, 5);
  const Geometry same{{3, 3}, {1, 1}, {1, 1}, {1, 1}}, other{{2, 3}, {2, 1}, {1, 2}, {1, 2}};
  check_read(Problem(8, 8, same, false, true));
  for (const bool masked : {false, true}) {
    const bool one_block = !masked;
    for (const Problem& p :
         {Problem(24, 40, same, false, masked), Problem(16, 8, other, false, masked),
          Problem(8, 8, same, true, masked)}) {
      check_outputs(p, one_block);
      check_gradients(p, one_block);
    }
  }
  if (failures == 0) std::printf("all device kernels are right\n");
  return failures == 0 ? 0 : 1;
}
