// The CPU kernels of the family as ops.
#include <atomic>
#include <tuple>

#include "common/registry.h"
#include "splat2d/cpu_scene.h"

namespace sapwood::splat2d {
namespace {

// Pairs worth a thread; a pair takes about half a nanosecond.
constexpr double kGrain = 32768;

// Gradients up to this size stay in the cache of a core.
constexpr int64_t kCacheBytes = int64_t{1} << 20;

template <class T>
void copy_out(const Band<T>& band, int64_t height, T* image) {
  for (int64_t r = 0; r < band.rows; ++r) {
    for (int64_t c = 0; c < band.channels; ++c) {
      std::copy_n(band.pixels + (r * band.channels + c) * band.pitch, band.width,
                  image + (c * height + band.first + r) * band.width);
    }
  }
}

// image (B, C, H, W): one task per band of rows, so that no two write to the same pixel.
template <class T>
void draw_bands(Scene<T>& scene, const T* feat, int64_t channels, T* image) {
  BandLists<T> lists(scene);
  const int64_t height = scene.height, width = scene.width, pitch = padded(width);
  const double area = static_cast<double>(kBand * width);
  const auto weight_before = [&](int64_t band) {  // about a pair per pixel to clear and to copy
    return static_cast<double>(lists.begin(band)) * 200 + static_cast<double>(band) * area;
  };
  parallel_weighted(lists.bands(), kGrain, weight_before, [&](int64_t task) {
    Scratch<T> pixels(kBand * channels * pitch);
    const int64_t b = task / lists.per_item, first = task % lists.per_item * kBand;
    const Band<T> band{pixels.get(), first, std::min<int64_t>(kBand, height - first),
                       width,        pitch, channels};
    std::fill_n(band.pixels, kBand * channels * pitch, T(0));
    SAPWOOD_ISA_CALL(draw_all(scene.item(b), feat + b * scene.n * channels, lists.ids(task),
                              lists.begin(task + 1) - lists.begin(task), band));
    copy_out(band, height, image + b * channels * height * width);
  });
}

Tensor splat2d(const Tensor& mu_in, const Tensor& chol_in, const Tensor& feat_in,
               const std::optional<Tensor>& counts, int64_t height, int64_t width, double cutoff) {
  const char* op = "splat2d";
  check_gaussians(op, mu_in, chol_in, counts);
  check_features(op, feat_in, mu_in);
  check_size(op, height, width);
  check_cutoff(op, cutoff);
  const ScalarType type = compute_type(mu_in);
  const Tensor mu = contiguous_as(mu_in, type), chol = contiguous_as(chol_in, type);
  const Tensor feat = contiguous_as(feat_in, type);
  const Tensor image = new_tensor(mu, {mu.size(0), feat.size(2), height, width}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Scene<T> scene(mu, chol, counts, height, width, Cut::of<T>(cutoff));
    draw_bands(scene, data<T>(feat), feat.size(2), mutable_data<T>(image));
  });
  return in_type(image, mu_in.scalar_type());
}

// Items [begin, end) of a batch.
struct Items {
  int64_t begin, end;
};

// Copies the images (C, H, W) of some items, of any strides, into padded rows with the channels one
// after another; returns whether every value is finite.
template <class T>
bool copy_in(const Tensor& grad, Items items, T* rows, int64_t pitch) {
  const int64_t channels = grad.size(1), height = grad.size(2), width = grad.size(3);
  const int64_t strides[] = {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
  const T* from = data<T>(grad) + items.begin * strides[0];
  const int64_t total = (items.end - items.begin) * height, grain = 1 + 16384 / (channels * pitch);
  std::atomic<bool> finite{true};
  parallel_range(total, grain, [&](int64_t begin, int64_t end) {
    bool all = true;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / height, y = row % height;
      for (int64_t c = 0; c < channels; ++c) {
        T* to = rows + (row * channels + c) * pitch;
        SAPWOOD_ISA_CALL(copy_row(from + b * strides[0] + c * strides[1] + y * strides[2],
                                  strides[3], width, to, all));
      }
    }
    if (!all) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

template <class T>
struct Outputs {
  T *mu, *chol, *feat, *abs_mu;
};

// One task per chunk of Gaussians: each is written once, and no sum is shared. `order` may be empty.
template <class T>
void differentiate_items(Scene<T>& scene, Items items, const std::vector<int64_t>& order,
                         const T* feat, const Gradient<T>& first, const Outputs<T>& to) {
  const int64_t begin = items.begin * scene.n, end = items.end * scene.n;
  const int64_t tasks = (end - begin + kChunk - 1) / kChunk, channels = first.channels;
  const Gaussian<T>* gaussians = scene.item(0);
  const double operations = 10000.0 * static_cast<double>(end - begin);  // of some hundred pairs
  parallel_dynamic(tasks, useful_workers(tasks, operations), [&](int64_t, int64_t task) {
    Scratch<T> scratch(channels * kPad);
    const int64_t from = begin + task * kChunk;
    for (int64_t at = from; at < std::min(end, from + kChunk); ++at) {
      const int64_t i = order.empty() ? at : order[static_cast<size_t>(at)];
      Gradient<T> image = first;
      image.pixels += (i / scene.n - items.begin) * scene.height * channels * first.pitch;
      const Slopes<T> slopes{to.mu + 2 * i, to.chol + 3 * i, to.feat + channels * i,
                             to.abs_mu == nullptr ? nullptr : to.abs_mu + 2 * i};
      SAPWOOD_ISA_CALL(
          differentiate(gaussians[i], feat + channels * i, image, scratch.get(), slopes));
    }
  });
}

// Some items at a time, so that the copy of their gradients is still in cache when it is read.
template <class T>
void differentiate_all(Scene<T>& scene, const Tensor& grad, const T* feat, const Outputs<T>& to) {
  const int64_t channels = grad.size(1), pitch = padded(scene.width);
  const int64_t item = scene.height * channels * pitch;
  const int64_t bytes = item * static_cast<int64_t>(sizeof(T));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t step = std::clamp<int64_t>(threads * kCacheBytes / bytes, 1, scene.batch);
  std::vector<int64_t> order;
  if (bytes > kCacheBytes) order = by_first_band(scene);
  Scratch<T> rows(step * item);
  for (int64_t b = 0; b < scene.batch; b += step) {
    const Items items{b, std::min(scene.batch, b + step)};
    const bool finite = copy_in(grad, items, rows.get(), pitch);
    const Gradient<T> first{rows.get(), scene.height, scene.width, pitch, channels, finite};
    differentiate_items(scene, items, order, feat, first, to);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> splat2d_backward(
    const Tensor& grad_in, const Tensor& mu_in, const Tensor& chol_in, const Tensor& feat_in,
    const std::optional<Tensor>& counts, double cutoff, bool with_stats) {
  const char* op = "splat2d_backward";
  check_gaussians(op, mu_in, chol_in, counts);
  check_features(op, feat_in, mu_in);
  check_gradient(op, grad_in, feat_in, mu_in);
  check_cutoff(op, cutoff);
  const ScalarType type = compute_type(mu_in), out = mu_in.scalar_type();
  const Tensor mu = contiguous_as(mu_in, type), chol = contiguous_as(chol_in, type);
  const Tensor feat = contiguous_as(feat_in, type), grad = in_type(grad_in, type);
  const int64_t batch = mu.size(0), n = mu.size(1), channels = feat.size(2);
  const Tensor d_mu = new_tensor(mu, {batch, n, 2}, type);
  const Tensor d_chol = new_tensor(mu, {batch, n, 3}, type);
  const Tensor d_feat = new_tensor(mu, {batch, n, channels}, type);
  const Tensor abs_mu = new_tensor(mu, {batch, with_stats ? n : 0, 2}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Scene<T> scene(mu, chol, counts, grad.size(2), grad.size(3), Cut::of<T>(cutoff));
    const Outputs<T> to{mutable_data<T>(d_mu), mutable_data<T>(d_chol), mutable_data<T>(d_feat),
                        with_stats ? mutable_data<T>(abs_mu) : nullptr};
    if (batch * n > 0) differentiate_all(scene, grad, data<T>(feat), to);
  });
  return {in_type(d_mu, out), in_type(d_chol, out), in_type(d_feat, out), in_type(abs_mu, out)};
}

Tensor splat2d_pairs(const Tensor& mu_in, const Tensor& chol_in,
                     const std::optional<Tensor>& counts, int64_t height, int64_t width,
                     double cutoff) {
  const char* op = "splat2d_pairs";
  check_gaussians(op, mu_in, chol_in, counts);
  check_size(op, height, width);
  check_cutoff(op, cutoff);
  const ScalarType type = compute_type(mu_in);
  const Tensor mu = contiguous_as(mu_in, type), chol = contiguous_as(chol_in, type);
  const Tensor total = new_tensor(mu, {mu.size(0)}, ScalarType::Long);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Scene<T> scene(mu, chol, counts, height, width, Cut::exactly(cutoff));
    int64_t* to = mutable_data<int64_t>(total);
    parallel_range(scene.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        to[b] = 0;
        for (int64_t i = 0; i < scene.n; ++i) {
          SAPWOOD_ISA_CALL(count_pixels(scene.item(b)[i], width, to[b]));
        }
      }
    });
  });
  return total;
}

}  // namespace
}  // namespace sapwood::splat2d

SAPWOOD_CPU_IMPL(m) {
  using namespace sapwood::splat2d;
  m.impl("splat2d", TORCH_BOX(&splat2d));
  m.impl("splat2d_backward", TORCH_BOX(&splat2d_backward));
  m.impl("splat2d_pairs", TORCH_BOX(&splat2d_pairs));
}
