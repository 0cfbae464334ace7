// Host-side services that are not tensors: what was compiled, and what this CPU can do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace {

py::dict build_report() {
  py::dict report;
  report["version"] = SAPWOOD_VERSION;
  report["compiler"] = "gcc " __VERSION__;
  report["torch_headers"] = SAPWOOD_BUILD_TORCH;
  report["cuda"] = std::string(SAPWOOD_BUILD_CUDA).empty()
                       ? py::object(py::none())
                       : py::object(py::str(SAPWOOD_BUILD_CUDA));
  report["cuda_archs"] = SAPWOOD_BUILD_ARCHS;
  return report;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) found.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512vl")) found.emplace_back("avx512vl");
  if (__builtin_cpu_supports("avx512dq")) found.emplace_back("avx512dq");
#elif defined(__aarch64__)
  found.emplace_back("neon");
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build and CPU report.";
  m.def("build_report", &build_report, "Versions and architectures this build was made with.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the kernels can use.");
}
