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
  m.def("log_circuit(Tensor x, Tensor? evidence, Tensor circuit, int[] counts) -> Tensor");
  m.def("log_circuit_backward(Tensor grad, Tensor x, Tensor? evidence, Tensor circuit, int[] counts) -> Tensor");
  m.def("log_scan_path(Tensor t, Tensor states, Tensor final, int num_samples, int seed, bool maximum) -> Tensor");

  // similarity: rows of x against each other, or against rows of y; kind is cosine, correlation, dot or euclidean
  m.def("row_normalize(Tensor x, str kind) -> Tensor");
  m.def("similarity_pairs(Tensor x, Tensor? y, float threshold, str kind, bool absolute, bool include_self, int max_pairs, bool recheck, str precision=\"fp32\") -> (Tensor row, Tensor col, Tensor value, Tensor truncated)");
  m.def("similarity_topk(Tensor x, Tensor? y, int k, str kind, bool absolute, bool include_self, bool recheck, str precision=\"fp32\") -> (Tensor values, Tensor indices)");
  m.def("similarity_clusters(Tensor x, float threshold, str kind, bool absolute) -> Tensor");

  // splat2d: image(c, p) = sum_n w_n(p) feat_n(c) with w = exp(-q / 2), q = |L^-1 (p - mu)|^2 <= cutoff
  m.def("splat2d(Tensor mu, Tensor chol, Tensor feat, Tensor? counts, int height, int width, float cutoff) -> Tensor");
  m.def("splat2d_backward(Tensor grad, Tensor mu, Tensor chol, Tensor feat, Tensor? counts, float cutoff, bool with_stats) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("splat2d_pairs(Tensor mu, Tensor chol, Tensor? counts, int height, int width, float cutoff) -> Tensor");

  // copruned_conv: a convolution in which every sample has its own tiles and filter groups
  m.def("copruned_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? region, Tensor? filters, Tensor? input_filters, Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, int tile, int filter_group, str activation) -> Tensor");
  m.def("copruned_conv2d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? region, Tensor? filters, Tensor? input_filters, int[] stride, int[] padding, int[] dilation, int groups, int tile, int filter_group, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("tile_list(Tensor mask) -> (Tensor items, Tensor count)");
}
