// The CPU kernels of the family as ops.
#include <atomic>
#include <tuple>

#include "common/registry.h"
#include "splat2d/cpu_scene.h"

namespace sapwood::splat2d {
namespace {

// Pairs worth a thread; a pair takes about half a nanosecond.
constexpr double kGrain = 32768;

// A gradient up to this size is in cache whatever the order of the Gaussians.
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
  const Tensor image =
      torch::stable::new_empty(mu, {mu.size(0), feat.size(2), height, width}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    Scene<T> scene(mu, chol, counts, height, width, Cut::of<T>(cutoff));
    draw_bands(scene, data<T>(feat), feat.size(2), mutable_data<T>(image));
  });
  return in_type(image, mu_in.scalar_type());
}

// Copies an image (C, H, W) of any strides into padded rows with the channels one after another.
template <class T>
void copy_in(const Tensor& grad, T* rows, int64_t pitch, std::atomic<bool>& finite) {
  const int64_t channels = grad.size(1), height = grad.size(2), width = grad.size(3);
  const T* from = data<T>(grad);
  const int64_t strides[] = {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)};
  parallel_range(
      grad.size(0) * height, 1 + 16384 / (channels * pitch), [&](int64_t begin, int64_t end) {
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
}

template <class T>
struct Outputs {
  T *mu, *chol, *feat, *abs_mu;
};

// One task per chunk of Gaussians: each is written once, and no sum is shared.
template <class T>
void differentiate_all(Scene<T>& scene, const T* feat, int64_t channels, const T* rows, bool finite,
                       const Outputs<T>& to) {
  const int64_t pitch = padded(scene.width), item = scene.height * channels * pitch;
  const int64_t total = scene.batch * scene.n, tasks = (total + kChunk - 1) / kChunk;
  const Gaussian<T>* gaussians = scene.item(0);
  const double pairs = 200.0 * static_cast<double>(total);
  const bool small = item * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
  const std::vector<int64_t> order = small ? std::vector<int64_t>{} : by_first_band(scene);
  parallel_dynamic(tasks, useful_workers(tasks, 50 * pairs), [&](int64_t, int64_t task) {
    Scratch<T> scratch(channels * kPad);
    for (int64_t at = task * kChunk; at < std::min(total, (task + 1) * kChunk); ++at) {
      const int64_t i = small ? at : order[static_cast<size_t>(at)];
      const Gradient<T> image{
          rows + i / scene.n * item, scene.height, scene.width, pitch, channels, finite};
      const Slopes<T> slopes{to.mu + 2 * i, to.chol + 3 * i, to.feat + channels * i,
                             to.abs_mu == nullptr ? nullptr : to.abs_mu + 2 * i};
      SAPWOOD_ISA_CALL(
          differentiate(gaussians[i], feat + channels * i, image, scratch.get(), slopes));
    }
  });
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
  const Tensor d_mu = torch::stable::new_empty(mu, {batch, n, 2}, type);
  const Tensor d_chol = torch::stable::new_empty(mu, {batch, n, 3}, type);
  const Tensor d_feat = torch::stable::new_empty(mu, {batch, n, channels}, type);
  const Tensor abs_mu = torch::stable::new_empty(mu, {batch, with_stats ? n : 0, 2}, type);
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t height = grad.size(2), width = grad.size(3), pitch = padded(width);
    Scene<T> scene(mu, chol, counts, height, width, Cut::of<T>(cutoff));
    Scratch<T> rows(batch * height * channels * pitch);
    std::atomic<bool> finite{true};
    copy_in(grad, rows.get(), pitch, finite);
    const Outputs<T> to{mutable_data<T>(d_mu), mutable_data<T>(d_chol), mutable_data<T>(d_feat),
                        with_stats ? mutable_data<T>(abs_mu) : nullptr};
    differentiate_all(scene, data<T>(feat), channels, rows.get(), finite.load(), to);
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
  const Tensor total = torch::stable::new_empty(mu, {mu.size(0)}, ScalarType::Long);
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
