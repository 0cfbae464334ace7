// splat2d on CUDA: tensors in, launches of the kernels in cuda_*.cuh, registration.
#include <algorithm>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/cuda.h"
#include "common/cuda_tensor.h"
#include "common/registry.h"
#include "common/tensor.h"
#include "splat2d/cpu_arguments.h"
#include "splat2d/cuda_backward.cuh"
#include "splat2d/cuda_forward.cuh"

namespace sapwood::splat2d::device {
namespace {

// Float for float32 and half precision, double for float64.
template <class F>
void with_type(ScalarType type, F&& f) {
  if (type == ScalarType::Double) return f(Type<double>{});
  return f(Type<float>{});
}

Tensor bytes(const Tensor& like, int64_t count) {
  return new_tensor(like, {count}, ScalarType::Byte);
}

// The Gaussians of a batch, prepared, with the memory that holds them.
template <class T>
class Scene {
 public:
  Scene(const Tensor& mu_in, const Tensor& chol_in, const std::optional<Tensor>& counts, Shape s,
        const Cut& cut, Stream stream)
      : shape(s), memory_(bytes(mu_in, s.batch * s.n * static_cast<int64_t>(sizeof(Gaussian<T>)))) {
    const Tensor mu = contiguous_as(mu_in, compute_type(mu_in));
    const Tensor chol = contiguous_as(chol_in, compute_type(mu_in));
    if (s.batch * s.n == 0) return;
    launch_prepare<T>(input<T>(mu), input<T>(chol), counts ? input<int64_t>(*counts) : nullptr,
                      counts ? counts->stride(0) : 0, s, cut, gaussians(), stream);
  }

  Gaussian<T>* gaussians() const {
    return reinterpret_cast<Gaussian<T>*>(output<uint8_t>(memory_));
  }

  Shape shape;

 private:
  Tensor memory_;
};

void check_devices(const char* op, const Tensor& mu, const Tensor& chol,
                   const std::optional<Tensor>& counts) {
  check_device(op, "chol", chol, "mu", mu);
  if (counts) check_device(op, "counts", *counts, "mu", mu);
}

// How many tiles have their lists at a time: they take 8 bytes per Gaussian and 16 per pixel, or 1 MB.
int64_t tiles_of_slab(const Shape& s) {
  const int64_t words = std::max(s.batch * (2 * s.n + 4 * s.height * s.width), int64_t{1} << 18);
  const int64_t fitting = words / std::max<int64_t>(1, s.words());
  return std::clamp<int64_t>(fitting, 1, std::max<int64_t>(1, s.batch * s.tiles()));
}

template <class T>
void draw(const Scene<T>& scene, const T* feat, T* image, const Tensor& like, Stream stream) {
  const Shape& s = scene.shape;
  const int64_t tiles = s.batch * s.tiles(), step = tiles_of_slab(s);
  Tensor memory = new_tensor(like, {step * s.words()}, ScalarType::Int);
  uint32_t* lists = reinterpret_cast<uint32_t*>(output<int32_t>(memory));
  for (int64_t first = 0; first < tiles; first += step) {
    const Slab slab{first, std::min(step, tiles - first)};
    torch::stable::zero_(memory);
    launch_mark<T>(scene.gaussians(), s, slab, lists, stream);
    launch_draw<T>(scene.gaussians(), feat, lists, s, slab, image, stream);
  }
}

Tensor splat2d(const Tensor& mu, const Tensor& chol, const Tensor& feat_in,
               const std::optional<Tensor>& counts, int64_t height, int64_t width, double cutoff) {
  const char* op = "splat2d";
  check_gaussians(op, mu, chol, counts);
  check_features(op, feat_in, mu);
  check_size(op, height, width);
  check_cutoff(op, cutoff);
  check_devices(op, mu, chol, counts);
  check_device(op, "feat", feat_in, "mu", mu);
  const DeviceScope scope(mu);
  const Stream stream = current_stream(mu);
  const ScalarType type = compute_type(mu);
  const Shape s{mu.size(0), mu.size(1), feat_in.size(2), height, width};
  Tensor image = new_tensor(mu, {s.batch, s.channels, height, width}, type);
  if (s.batch * s.n * s.channels == 0) {
    torch::stable::zero_(image);
    return in_type(image, mu.scalar_type());
  }
  const Tensor feat = contiguous_as(feat_in, type);
  with_type(type, [&](auto kind) {
    using T = typename decltype(kind)::type;
    const Scene<T> scene(mu, chol, counts, s, Cut::of<T>(cutoff), stream);
    draw<T>(scene, input<T>(feat), output<T>(image), mu, stream);
  });
  return in_type(image, mu.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> splat2d_backward(const Tensor& grad_in, const Tensor& mu,
                                                            const Tensor& chol,
                                                            const Tensor& feat_in,
                                                            const std::optional<Tensor>& counts,
                                                            double cutoff, bool with_stats) {
  const char* op = "splat2d_backward";
  check_gaussians(op, mu, chol, counts);
  check_features(op, feat_in, mu);
  check_gradient(op, grad_in, feat_in, mu);
  check_cutoff(op, cutoff);
  check_devices(op, mu, chol, counts);
  check_device(op, "feat", feat_in, "mu", mu);
  check_device(op, "grad", grad_in, "mu", mu);
  const DeviceScope scope(mu);
  const Stream stream = current_stream(mu);
  const ScalarType type = compute_type(mu), out = mu.scalar_type();
  const Shape s{mu.size(0), mu.size(1), feat_in.size(2), grad_in.size(2), grad_in.size(3)};
  const Tensor d_mu = new_tensor(mu, {s.batch, s.n, 2}, type);
  const Tensor d_chol = new_tensor(mu, {s.batch, s.n, 3}, type);
  const Tensor d_feat = new_tensor(mu, {s.batch, s.n, s.channels}, type);
  const Tensor abs_mu = new_tensor(mu, {s.batch, with_stats ? s.n : 0, 2}, type);
  if (s.batch * s.n > 0) {
    const Tensor feat = contiguous_as(feat_in, type), grad = contiguous_as(grad_in, type);
    with_type(type, [&](auto kind) {
      using T = typename decltype(kind)::type;
      const Scene<T> scene(mu, chol, counts, s, Cut::of<T>(cutoff), stream);
      const Inputs<T> in{scene.gaussians(), input<T>(feat), input<T>(grad), s};
      const Outputs<T> to{output<T>(d_mu), output<T>(d_chol), output<T>(d_feat),
                          with_stats ? output<T>(abs_mu) : nullptr};
      launch_differentiate<T>(in, to, stream);
    });
  }
  return {in_type(d_mu, out), in_type(d_chol, out), in_type(d_feat, out), in_type(abs_mu, out)};
}

Tensor splat2d_pairs(const Tensor& mu, const Tensor& chol, const std::optional<Tensor>& counts,
                     int64_t height, int64_t width, double cutoff) {
  const char* op = "splat2d_pairs";
  check_gaussians(op, mu, chol, counts);
  check_size(op, height, width);
  check_cutoff(op, cutoff);
  check_devices(op, mu, chol, counts);
  const DeviceScope scope(mu);
  const Stream stream = current_stream(mu);
  const Shape s{mu.size(0), mu.size(1), 1, height, width};
  Tensor totals = new_tensor(mu, {s.batch}, ScalarType::Long);
  torch::stable::zero_(totals);
  if (s.batch * s.n == 0) return totals;
  with_type(compute_type(mu), [&](auto kind) {
    using T = typename decltype(kind)::type;
    const Scene<T> scene(mu, chol, counts, s, Cut::exactly(cutoff), stream);
    launch_count_pixels<T>(scene.gaussians(), s, output<int64_t>(totals), stream);
  });
  return totals;
}

}  // namespace
}  // namespace sapwood::splat2d::device

SAPWOOD_CUDA_IMPL(m) {
  using namespace sapwood::splat2d::device;
  m.impl("splat2d", TORCH_BOX(&splat2d));
  m.impl("splat2d_backward", TORCH_BOX(&splat2d_backward));
  m.impl("splat2d_pairs", TORCH_BOX(&splat2d_pairs));
}
