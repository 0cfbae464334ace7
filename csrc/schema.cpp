// Every op of sapwood on one screen. Kernels register themselves in csrc/<family>/{cpu.cpp,cuda.cu};
// fakes, autograd and vmap are declared in python/sapwood/ops/<family>.py.
#include "common/registry.h"

SAPWOOD_LIBRARY(m) {
  // masked_matmul: y = x (W o M)^T + b
  m.def("masked_matmul(Tensor x, Tensor weight, Tensor mask, Tensor? bias, bool dense_weight_grad) -> Tensor");
  m.def("masked_matmul_backward(Tensor grad, Tensor x, Tensor weight, Tensor mask, bool need_x, bool need_weight, bool dense_weight_grad) -> (Tensor, Tensor)");
  m.def("pack_csr(Tensor weight, Tensor mask) -> (Tensor values, Tensor cols, Tensor row_ptr, Tensor row_order)");
  m.def("pack_bitmap(Tensor weight, Tensor mask) -> (Tensor values, Tensor words, Tensor row_ptr)");
  m.def("pack_sell(Tensor weight, Tensor mask) -> (Tensor values, Tensor index, Tensor window, Tensor slice_ptr)");
  m.def("transpose_csr(Tensor cols, Tensor row_ptr, int k) -> (Tensor cols_t, Tensor row_ptr_t, Tensor row_order_t, Tensor perm)");
  m.def("packed_linear_csr(Tensor x, Tensor values, Tensor cols, Tensor row_ptr, Tensor row_order, Tensor? bias, int k, str activation, Tensor? cols_t, Tensor? row_ptr_t, Tensor? row_order_t, Tensor? perm) -> Tensor");
  m.def("packed_linear_bitmap(Tensor x, Tensor values, Tensor words, Tensor row_ptr, Tensor? bias, int k, str activation) -> Tensor");
  m.def("packed_linear_sell(Tensor x, Tensor values, Tensor index, Tensor window, Tensor slice_ptr, Tensor? bias, int n, int k, str activation) -> Tensor");
  m.def("sampled_matmul(Tensor grad, Tensor x, Tensor cols, Tensor row_ptr) -> Tensor");

  // logsemiring: c_ij = log sum_k exp(a_ik + b_kj)
  m.def("log_matmul(Tensor a, Tensor b, bool exact) -> Tensor");
  m.def("log_matmul_backward(Tensor grad, Tensor a, Tensor b, bool exact, bool need_a, bool need_b) -> (Tensor, Tensor)");
  m.def("log_matmul_double_backward(Tensor grad, Tensor a, Tensor b, Tensor tangent_a, Tensor tangent_b) -> (Tensor, Tensor, Tensor)");
  m.def("max_matmul(Tensor a, Tensor b) -> (Tensor values, Tensor indices)");
  m.def("sample_matmul(Tensor a, Tensor b, int num_samples, int seed) -> Tensor");
  m.def("segment_logsumexp(Tensor x, Tensor ptr, Tensor? order) -> Tensor");
  m.def(
      "segment_logsumexp_backward(Tensor grad, Tensor x, Tensor ptr, Tensor? order) -> Tensor");
  m.def("segment_logsumexp_double_backward(Tensor grad, Tensor x, Tensor tangent, Tensor ptr, Tensor? order) -> (Tensor, Tensor)");
  m.def("segment_softmax(Tensor x, Tensor ptr, Tensor? order) -> Tensor");
  m.def("segment_max(Tensor x, Tensor ptr, Tensor? order) -> (Tensor values, Tensor indices)");
  m.def("log_scan(Tensor t, Tensor init, bool maximum) -> Tensor");
  m.def("log_scan_backward(Tensor grad, Tensor t, Tensor states, bool maximum) -> (Tensor, Tensor)");
  m.def("log_scan_path(Tensor t, Tensor states, Tensor final, int num_samples, int seed, bool maximum) -> Tensor");

  // similarity: rows of x against each other, or against rows of y; kind is cosine, correlation, dot or euclidean
  m.def("row_normalize(Tensor x, str kind) -> Tensor");
  m.def("similarity_pairs(Tensor x, Tensor? y, float threshold, str kind, bool absolute, bool include_self, int max_pairs, bool recheck) -> (Tensor row, Tensor col, Tensor value, Tensor truncated)");
  m.def("similarity_topk(Tensor x, Tensor? y, int k, str kind, bool absolute, bool include_self, bool recheck) -> (Tensor values, Tensor indices)");
  m.def("similarity_clusters(Tensor x, float threshold, str kind, bool absolute) -> Tensor");
}
