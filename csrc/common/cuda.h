// What a CUDA op needs of torch besides tensors: the device, the stream and one number read back.
// In emulation tensors live on the CPU and all three are trivial.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "common/launch.h"

#if !defined(SAPWOOD_EMULATE)
#include <dlfcn.h>
#endif

namespace sapwood {

#if defined(SAPWOOD_EMULATE)

struct DeviceScope {
  explicit DeviceScope(const torch::stable::Tensor&) {}
};

inline Stream current_stream(const torch::stable::Tensor&) {
  return nullptr;
}

inline int64_t read_back(const int64_t* address, Stream) {
  return *address;
}

#else

// Makes the tensor's device current until the end of the scope, for torch and for the CUDA runtime
// inside this library, which is another instance than torch's. Both share the primary context.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    SAPWOOD_CUDA_CHECK(cudaSetDevice(tensor.get_device_index()));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream shim lives in libtorch_cuda. Linking to it would keep the library from loading in a
// CPU-only torch, so it is looked up in the process when the first CUDA op runs.
inline Stream current_stream(const torch::stable::Tensor& tensor) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Lookup>(symbol);
  }();
  if (lookup == nullptr) throw std::runtime_error("sapwood: this PyTorch has no CUDA support");
  void* stream = nullptr;
  if (lookup(tensor.get_device_index(), &stream) != TORCH_SUCCESS) {
    throw std::runtime_error("sapwood: torch could not name the current CUDA stream");
  }
  return static_cast<Stream>(stream);
}

// Copies one number to the host; waits for the stream.
inline int64_t read_back(const int64_t* address, Stream stream) {
  int64_t value = 0;
  SAPWOOD_CUDA_CHECK(
      cudaMemcpyAsync(&value, address, sizeof(value), cudaMemcpyDeviceToHost, stream));
  SAPWOOD_CUDA_CHECK(cudaStreamSynchronize(stream));
  return value;
}

#endif

}  // namespace sapwood
