// Checked tensors as the kernels read them, and the lists of Gaussians per band of rows.
#pragma once

#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/tensor.h"
#include "splat2d/cpu_arguments.h"
#include "splat2d/kernel.h"

namespace sapwood::splat2d {

// f(T{}) for float32 or float64.
template <class F>
void with_type(ScalarType type, const F& f) {
  if (type == ScalarType::Double) return f(double{});
  return f(float{});
}

// All Gaussians of a batch, prepared.
template <class T>
class Scene {
 public:
  Scene(const Tensor& mu, const Tensor& chol, const std::optional<Tensor>& counts, int64_t height,
        int64_t width, const Cut& cut)
      : batch(mu.size(0)),
        n(mu.size(1)),
        height(height),
        width(width),
        gaussians_(batch * n),
        exists_(existing(counts, batch, n)) {
    const T *centres = data<T>(mu), *shapes = data<T>(chol);
    Gaussian<T>* to = gaussians_.get();
    constexpr int64_t block = 1024;  // of the Gaussians of one item
    const int64_t blocks = (n + block - 1) / block;
    parallel_range(batch * blocks, 1 + block / (n + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / blocks, from = i % blocks * block;
        SAPWOOD_ISA_CALL(prepare_all(centres + 2 * b * n, shapes + 3 * b * n, from,
                                     std::min(n, from + block), exists_[static_cast<size_t>(b)],
                                     height, width, cut, to + b * n));
      }
    });
  }

  const Gaussian<T>* item(int64_t b) { return gaussians_.get() + b * n; }

  int64_t batch, n, height, width;

 private:
  Scratch<Gaussian<T>> gaussians_;
  std::vector<int64_t> exists_;

  static std::vector<int64_t> existing(const std::optional<Tensor>& counts, int64_t batch,
                                       int64_t n) {
    std::vector<int64_t> found(static_cast<size_t>(batch), n);
    for (int64_t b = 0; counts && b < batch; ++b) {
      const int64_t given = data<int64_t>(*counts)[b * counts->stride(0)];
      found[static_cast<size_t>(b)] = std::clamp<int64_t>(given, 0, n);
    }
    return found;
  }
};

// For every band of every item the Gaussians that reach it, in the order of their ids.
template <class T>
class BandLists {
 public:
  explicit BandLists(Scene<T>& scene)
      : per_item((scene.height + kBand - 1) / kBand),
        begin_(static_cast<size_t>(scene.batch * per_item + 1)),
        ids_(count(scene)) {
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    int32_t* ids = ids_.get();
    each(scene, [&](int64_t band, int32_t id) { ids[next[static_cast<size_t>(band)]++] = id; });
  }

  int64_t bands() const { return static_cast<int64_t>(begin_.size()) - 1; }
  int64_t begin(int64_t band) const { return begin_[static_cast<size_t>(band)]; }
  const int32_t* ids(int64_t band) { return ids_.get() + begin(band); }

  int64_t per_item;

 private:
  std::vector<int64_t> begin_;
  Scratch<int32_t> ids_;

  template <class F>
  void each(Scene<T>& scene, const F& f) const {
    for (int64_t b = 0; b < scene.batch; ++b) {
      const Gaussian<T>* gaussians = scene.item(b);
      for (int64_t i = 0; i < scene.n; ++i) {
        const Gaussian<T>& g = gaussians[i];
        if (g.top >= g.bottom) continue;
        const int64_t last = (g.bottom - 1) / kBand;
        for (int64_t band = g.top / kBand; band <= last; ++band) {
          f(b * per_item + band, static_cast<int32_t>(i));
        }
      }
    }
  }

  int64_t count(Scene<T>& scene) {
    each(scene, [&](int64_t band, int32_t) { ++begin_[static_cast<size_t>(band + 1)]; });
    for (size_t i = 1; i < begin_.size(); ++i) begin_[i] += begin_[i - 1];
    return begin_.back();
  }
};

// All Gaussians of a batch by item and first band: in this order neighbours read the same rows of a
// gradient, so that they are in cache. Nothing else depends on the order.
template <class T>
std::vector<int64_t> by_first_band(Scene<T>& scene) {
  const int64_t bands = (scene.height + kBand - 1) / kBand;
  std::vector<int64_t> order(static_cast<size_t>(scene.batch * scene.n));
  std::vector<int64_t> next(static_cast<size_t>(bands + 1));
  for (int64_t b = 0; b < scene.batch; ++b) {
    const Gaussian<T>* gaussians = scene.item(b);
    std::fill(next.begin(), next.end(), int64_t{0});
    for (int64_t i = 0; i < scene.n; ++i) {
      ++next[static_cast<size_t>(std::min(gaussians[i].top / kBand + int64_t{1}, bands))];
    }
    next[0] = b * scene.n;
    for (size_t band = 1; band < next.size(); ++band) next[band] += next[band - 1];
    for (int64_t i = 0; i < scene.n; ++i) {
      const auto band = static_cast<size_t>(std::min<int64_t>(gaussians[i].top / kBand, bands - 1));
      order[static_cast<size_t>(next[band]++)] = b * scene.n + i;
    }
  }
  return order;
}

}  // namespace sapwood::splat2d
