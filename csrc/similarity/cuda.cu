// similarity on CUDA: tensors in, launches of the kernels in cuda_*.cuh, registration. The sort and
// the running sums are torch's, reached through the dispatcher.
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/cuda.h"
#include "common/cuda_tensor.h"
#include "common/registry.h"
#include "common/tensor.h"
#include "similarity/cpu_arguments.h"
#include "similarity/cuda_pairs.cuh"
#include "similarity/cuda_topk.cuh"

namespace sapwood::similarity::device {
namespace {

Kind device_kind(similarity::Kind kind) {
  switch (kind) {
    case similarity::Kind::dot:
      return Kind::dot;
    case similarity::Kind::cosine:
      return Kind::cosine;
    case similarity::Kind::correlation:
      return Kind::correlation;
    default:
      return Kind::euclidean;
  }
}

// Float for float32 and half precision, double for float64.
template <class F>
void with_type(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Double) return f(Type<double>{});
  return f(Type<float>{});
}

Tensor row_normalize(const Tensor& x, const std::string& kind_name) {
  const char* op = "row_normalize";
  const Kind kind = device_kind(parse_unit_kind(op, kind_name));
  check_rows(op, "x", x);
  const DeviceScope scope(x);
  const Stream stream = current_stream(x);
  const Tensor rows = as_contiguous(x);
  const Tensor unit = new_tensor(rows, rows.sizes());
  dispatch_float(op, "x", rows, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_normalize<T>(input<T>(rows), rows.size(0), rows.size(1), kind, output<T>(unit), nullptr,
                        stream);
  });
  return unit;
}

// One side of a search, with the memory it points to.
struct Side {
  Tensor x, unit, rows;

  template <class T>
  Operand<T> operand() const {
    return {input<T>(x), input<T>(unit), reinterpret_cast<const Row*>(input<double>(rows)),
            x.size(0)};
  }
};

template <class T>
Side side_of(const Tensor& x_in, Kind kind, Stream stream) {
  const Tensor x = contiguous_as(x_in, compute_type(x_in.scalar_type()));
  Side side{x, new_tensor(x, x.sizes()), new_tensor(x, {x.size(0) * 4}, ScalarType::Double)};
  static_assert(sizeof(Row) == 4 * sizeof(double));
  launch_normalize<T>(input<T>(x), x.size(0), x.size(1), kind, output<T>(side.unit),
                      reinterpret_cast<Row*>(output<double>(side.rows)), stream);
  return side;
}

template <class T>
Search<T> search_of(const Side& x, const Side& y, bool self, Kind kind, bool absolute,
                    bool include_self, bool recheck) {
  const Tolerance t = Tolerance::of<T>(
      is_unit(kind) ? similarity::Kind::cosine : similarity::Kind::dot, x.x.size(1), recheck);
  return {x.operand<T>(), y.operand<T>(), x.x.size(1), kind,       self,
          absolute,       include_self,   recheck,     t.relative, t.absolute};
}

void check_sides(const char* op, const Tensor& x, const std::optional<Tensor>& y) {
  check_rows(op, "x", x);
  if (!y) return;
  check_candidates(op, *y, x);
  check_device(op, "y", *y, "x", x);
}

template <class T>
struct FoundPairs {
  Tensor keys, values;
  int64_t count;
  bool truncated;
};

Tensor first(Tensor t, int64_t count) {
  return torch::stable::narrow(t, 0, 0, count);
}

// One pass into a buffer that usually suffices; if it does not, one more over the rows that count.
template <class T>
FoundPairs<T> find_pairs(const Search<T>& s, double threshold, int64_t max_pairs, const Tensor& x,
                         Stream stream) {
  const int64_t guess = std::max<int64_t>(4 * s.x.n, 1024);
  int64_t capacity = max_pairs < 0 ? guess : std::min(guess, max_pairs + 1);
  int64_t row_limit = s.x.n;
  FoundPairs<T> found{x, x, 0, false};
  for (int pass = 0;; ++pass) {
    const Tensor counts = torch::stable::fill_(new_tensor(x, {s.x.n + 1}, ScalarType::Long), 0.0);
    found.keys = new_tensor(x, {capacity}, ScalarType::Long);
    found.values = new_tensor(x, {capacity});
    auto* cells = reinterpret_cast<unsigned long long*>(output<int64_t>(counts));
    launch_pairs<T>(s, threshold,
                    {output<int64_t>(found.keys), output<T>(found.values), capacity, row_limit,
                     cells, cells + s.x.n},
                    stream);
    found.count = read_back(input<int64_t>(counts) + s.x.n, stream);
    if (pass == 0) found.truncated = max_pairs >= 0 && found.count > max_pairs;
    if (found.count <= capacity && (!found.truncated || pass > 0)) return found;
    capacity = found.count;
    if (!found.truncated) continue;
    const Tensor ends =
        call("aten::cumsum", "", first(counts, s.x.n), int64_t{0}, std::optional<ScalarType>());
    const Tensor limit = new_tensor(x, {2}, ScalarType::Long);
    launch_row_limit(input<int64_t>(ends), s.x.n, max_pairs, output<int64_t>(limit), stream);
    row_limit = read_back(input<int64_t>(limit), stream);
    capacity = read_back(input<int64_t>(limit) + 1, stream);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_pairs(
    const Tensor& x, const std::optional<Tensor>& y, double threshold, const std::string& kind_name,
    bool absolute, bool include_self, int64_t max_pairs, bool recheck,
    const std::string& precision) {
  const char* op = "similarity_pairs";
  parse_precision(op, precision, recheck);  // a permission, of which this kernel makes no use
  const Kind kind = device_kind(parse_kind(op, kind_name));
  check_sides(op, x, y);
  const DeviceScope scope(x);
  const Stream stream = current_stream(x);
  Tensor row, col, value, truncated;
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Side left = side_of<T>(x, kind, stream);
    const Side right = y ? side_of<T>(*y, kind, stream) : left;
    const auto s = search_of<T>(left, right, !y, kind, absolute, include_self, recheck);
    const FoundPairs<T> found = find_pairs<T>(s, threshold, max_pairs, left.x, stream);
    const int64_t count = found.truncated ? max_pairs : found.count;
    const Tensor used = first(found.keys, found.count);
    const Tensor order = first(call("aten::argsort", "", used, int64_t{0}, false), count);
    const Tensor keys = call("aten::index_select", "", used, int64_t{0}, order);
    value = call("aten::index_select", "", first(found.values, found.count), int64_t{0}, order);
    row = new_tensor(keys, {count});
    col = new_tensor(keys, {count});
    launch_split(input<int64_t>(keys), count, std::max<int64_t>(1, s.y.n), output<int64_t>(row),
                 output<int64_t>(col), stream);
    truncated =
        torch::stable::fill_(new_tensor(left.x, {}, ScalarType::Bool), found.truncated ? 1.0 : 0.0);
  });
  return {row, col, value, truncated};
}

std::tuple<Tensor, Tensor> similarity_topk(const Tensor& x, const std::optional<Tensor>& y,
                                           int64_t k, const std::string& kind_name, bool absolute,
                                           bool include_self, bool recheck,
                                           const std::string& precision) {
  const char* op = "similarity_topk";
  parse_precision(op, precision, recheck);  // a permission, of which this kernel makes no use
  const Kind kind = device_kind(parse_kind(op, kind_name));
  check_sides(op, x, y);
  check_k(op, k);
  const DeviceScope scope(x);
  const Stream stream = current_stream(x);
  const std::array<int64_t, 2> shape{x.size(0), k};
  Tensor values, indices;
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Side left = side_of<T>(x, kind, stream);
    const Side right = y ? side_of<T>(*y, kind, stream) : left;
    const auto s = search_of<T>(left, right, !y, kind, absolute, include_self, recheck);
    values = new_tensor(left.x, shape);
    indices = new_tensor(left.x, shape, ScalarType::Long);
    const Tensor keys = new_tensor(left.x, shape, ScalarType::Double);
    const Tensor found = new_tensor(indices, shape);
    launch_topk<T>(s, {output<double>(keys), output<int64_t>(found), k}, output<T>(values),
                   output<int64_t>(indices), stream);
  });
  return {values, indices};
}

Tensor similarity_clusters(const Tensor& x, double threshold, const std::string& kind_name,
                           bool absolute) {
  const char* op = "similarity_clusters";
  const Kind kind = device_kind(parse_kind(op, kind_name));
  check_rows(op, "x", x);
  const DeviceScope scope(x);
  const Stream stream = current_stream(x);
  const int64_t n = x.size(0);
  const Tensor parent = new_tensor(x, {n}, ScalarType::Int);
  const Tensor roots = new_tensor(x, {n}, ScalarType::Long);
  const Tensor labels = new_tensor(roots, {n});
  with_type(x, [&](auto type) {
    using T = typename decltype(type)::type;
    const Side side = side_of<T>(x, kind, stream);
    launch_clusters<T>(search_of<T>(side, side, true, kind, absolute, false, true), threshold,
                       output<int32_t>(parent), stream);
  });
  launch_roots(output<int32_t>(parent), n, output<int64_t>(roots), stream);
  const Tensor numbers = call("aten::cumsum", "", roots, int64_t{0}, std::optional<ScalarType>());
  launch_labels(output<int32_t>(parent), n, input<int64_t>(numbers), output<int64_t>(labels),
                stream);
  return labels;
}

}  // namespace
}  // namespace sapwood::similarity::device

SAPWOOD_CUDA_IMPL(m) {
  namespace ops = sapwood::similarity::device;
  m.impl("row_normalize", TORCH_BOX(&ops::row_normalize));
  m.impl("similarity_pairs", TORCH_BOX(&ops::similarity_pairs));
  m.impl("similarity_topk", TORCH_BOX(&ops::similarity_topk));
  m.impl("similarity_clusters", TORCH_BOX(&ops::similarity_clusters));
}
