// Host-side services that are not tensors: what was compiled, what this CPU can do, and loops over
// NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "select/kernel.h"

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

// C-contiguous; together with noconvert() a caller never gets a silent copy.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Flags = std::optional<Array<bool>>;

void require_size(const char* name, int64_t actual, int64_t expected) {
  if (actual != expected) {
    throw std::invalid_argument(std::string("sapwood._native: ") + name + " must have " +
                                std::to_string(expected) + " elements, got " +
                                std::to_string(actual));
  }
}

const uint8_t* flags(const char* name, const Flags& array, int64_t size) {
  if (!array) return nullptr;
  require_size(name, array->size(), size);
  return reinterpret_cast<const uint8_t*>(array->data());
}

sapwood::select::Order order_of(bool absolute, bool any_sign) {
  using sapwood::select::Order;
  return absolute ? Order::absolute : any_sign ? Order::any_sign : Order::nonnegative;
}

template <class I>
void count_digits(const Array<I>& bits, const Flags& active, const Flags& kept, bool absolute,
                  bool any_sign, int shift, int64_t prefix, Array<int64_t>& counts) {
  namespace select = sapwood::select;
  const int64_t size = bits.size();
  const uint8_t* on = flags("active", active, size);
  const uint8_t* guard = flags("kept", kept, size);
  require_size("counts", counts.size(), select::bins);
  const int top = 8 * sizeof(I) - select::digit_bits;
  if (shift < 0 || shift > top || shift % select::digit_bits != 0) {
    throw std::invalid_argument("sapwood._native: shift must be that of a digit, got " +
                                std::to_string(shift));
  }
  int64_t* out = counts.mutable_data();
  const I* in = bits.data();
  const py::gil_scoped_release release;
  select::with_keys<I>(in, on, guard, order_of(absolute, any_sign),
                       [&](auto keys) { select::count_digits(keys, size, shift, prefix, out); });
}

template <class I>
int64_t switch_off(const Array<I>& bits, const Flags& active, const Flags& kept, bool absolute,
                   bool any_sign, int64_t last, int64_t quota, Array<bool>& keep) {
  namespace select = sapwood::select;
  const int64_t size = bits.size();
  const uint8_t* on = flags("active", active, size);
  const uint8_t* guard = flags("kept", kept, size);
  require_size("keep", keep.size(), size);
  auto* out = reinterpret_cast<uint8_t*>(keep.mutable_data());
  const I* in = bits.data();
  int64_t gone = 0;
  const py::gil_scoped_release release;
  select::with_keys<I>(in, on, guard, order_of(absolute, any_sign),
                       [&](auto keys) { gone = select::switch_off(keys, size, last, quota, out); });
  return gone;
}

template <class I>
void bind_select(py::module_& m) {
  m.def("count_digits", &count_digits<I>, py::arg("bits").noconvert(),
        py::arg("active").noconvert(), py::arg("kept").noconvert(), py::arg("absolute"),
        py::arg("any_sign"), py::arg("shift"), py::arg("prefix"), py::arg("counts").noconvert(),
        "Adds the histogram of the 16 bits at `shift` over the keys below `prefix` to `counts`.");
  m.def("switch_off", &switch_off<I>, py::arg("bits").noconvert(), py::arg("active").noconvert(),
        py::arg("kept").noconvert(), py::arg("absolute"), py::arg("any_sign"), py::arg("last"),
        py::arg("quota"), py::arg("keep").noconvert(),
        "Writes the keep mask of a cut at the key `last`; returns how many of its ties went.");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build and CPU report, and loops over NumPy arrays.";
  m.def("build_report", &build_report, "Versions and architectures this build was made with.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that the kernels can use.");
  bind_select<int32_t>(m);
  bind_select<int64_t>(m);
}
