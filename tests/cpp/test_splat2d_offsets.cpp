// The device kernels of splat2d with more than 2^30 images: centres, shapes, features, images and
// gradients all have more than 2^31 elements. Memory is reserved, not filled, and the last blocks
// alone run. Torch-free.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "expect.h"
#include "reserved.h"
#include "splat2d/cuda_backward.cuh"
#include "splat2d/cuda_forward.cuh"

namespace {

using namespace sapwood::splat2d;
using namespace sapwood::splat2d::device;

// Images of one pixel, two channels and one Gaussian each.
struct Scene {
  explicit Scene(int64_t batch)
      : s{batch, 1, 2, 1, 1},
        mu(2 * batch),
        chol(3 * batch),
        feat(2 * batch),
        image(2 * batch),
        grad(2 * batch),
        d_mu(2 * batch),
        d_chol(3 * batch),
        d_feat(2 * batch),
        gaussians(batch),
        lists(batch) {
    for (int64_t i = batch - kLast; i < batch; ++i) {
      const auto x = static_cast<float>(i - batch);
      mu.get()[2 * i] = 0.25f * x;
      mu.get()[2 * i + 1] = 0.5f - 0.125f * x;
      chol.get()[3 * i] = 1.5f - 0.125f * x;
      chol.get()[3 * i + 1] = 0.25f;
      chol.get()[3 * i + 2] = 1.0f;
      for (int64_t c = 0; c < 2; ++c) {
        feat.get()[2 * i + c] = x - static_cast<float>(c);
        grad.get()[2 * i + c] = 1.0f + 0.5f * static_cast<float>(c) * x;
      }
    }
  }

  void run() const {
    const Slab slab{0, s.batch};
    launch_prepare<float>(mu.get(), chol.get(), nullptr, 0, s, Cut::of<float>(11.0),
                          gaussians.get(), nullptr);
    launch_mark<float>(gaussians.get(), s, slab, lists.get(), nullptr);
    launch_draw<float>(gaussians.get(), feat.get(), lists.get(), s, slab, image.get(), nullptr);
    launch_differentiate<float>({gaussians.get(), feat.get(), grad.get(), s},
                                {d_mu.get(), d_chol.get(), d_feat.get(), nullptr}, nullptr);
  }

  static constexpr int64_t kLast = 4;
  Shape s;
  Reserved<float> mu, chol, feat, image, grad, d_mu, d_chol, d_feat;
  Reserved<Gaussian<float>> gaussians;
  Reserved<uint32_t> lists;
};

void compare(const Reserved<float>& near, const Reserved<float>& far, int64_t near_count,
             int64_t far_count, int64_t each, const std::string& name) {
  for (int64_t i = 1; i <= each; ++i) {
    const float a = near.get()[near_count * each - i], b = far.get()[far_count * each - i];
    expect(a == b && a != 0, name + " " + std::to_string(i));
  }
}

}  // namespace

int main() {
  const int64_t batch = (int64_t{1} << 30) + Scene::kLast;
  const Scene near(Scene::kLast), far(batch);
  near.run();
  setenv("SAPWOOD_EMU_LAST_BLOCKS", "1", 1);
  far.run();
  compare(near.image, far.image, Scene::kLast, batch, 2, "image");  // of the last item
  compare(near.d_mu, far.d_mu, Scene::kLast, batch, 2, "gradient of mu");
  compare(near.d_chol, far.d_chol, Scene::kLast, batch, 3, "gradient of chol");
  compare(near.d_feat, far.d_feat, Scene::kLast, batch, 2, "gradient of feat");
  if (failures == 0) std::printf("all offsets are right\n");
  return failures == 0 ? 0 : 1;
}
