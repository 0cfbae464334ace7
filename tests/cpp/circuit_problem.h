// A circuit for the tests of the kernels, and its values and slopes once more, in double: two
// normalised heads, sums whose evidence selects one of their lists, and sums of these.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "logsemiring/circuit.h"

namespace sapwood::logsemiring {

class CircuitProblem {
 public:
  static constexpr int32_t kHead = 6, kInputs = 2 * kHead, kFirst = 5, kSecond = 40;
  static constexpr int32_t kColumns = kInputs + kFirst + kSecond, kResults = 3;

  CircuitProblem() {
    for (int32_t j = 0; j < kFirst; ++j) {  // pairs of one entry of each head
      sums_.emplace_back(3);
      for (int32_t list = 0; list < 3; ++list) {
        for (int32_t i = 0; i < kHead; ++i) {
          sums_[j][list].push_back({i, kHead + (i + j + list) % kHead});
        }
      }
    }
    for (int32_t j = 0; j < kSecond;
         ++j) {  // more terms than a warp has lanes, of one to three factors
      sums_.emplace_back(1);
      for (int32_t i = 0; i < kSecond; ++i) {
        std::vector<int32_t> term(1 + i % 3, kInputs + (i + j) % kFirst);
        term[0] = (i * j) % kInputs;
        sums_.back()[0].push_back(term);
      }
    }
    pack();
  }

  Circuit circuit() const { return unpack_circuit(packed_.data(), counts_); }
  bool packs() const { return static_cast<int64_t>(packed_.size()) == counts_.packed(); }

  // The results of a row and, for given slopes of these, those of its inputs x, which it replaces.
  void solve(std::vector<double>& x, int64_t evidence, const std::vector<double>& grad,
             std::vector<double>& results) const {
    std::vector<double> slopes(kColumns, 0.0);
    for (int32_t h = 0; h < 2; ++h) {
      const double total = log_sum({x.begin() + h * kHead, x.begin() + (h + 1) * kHead});
      for (int32_t i = h * kHead; i < (h + 1) * kHead; ++i) x[i] -= total;
    }
    for (int32_t j = 0; j < kFirst + kSecond; ++j) x.push_back(log_sum(terms(j, evidence, x)));
    results.clear();
    for (int32_t r = 0; r < kResults; ++r) {
      results.push_back(x[circuit().results[r]]);
      slopes[circuit().results[r]] += grad[r];
    }
    for (int32_t j = kFirst + kSecond - 1; j >= 0; --j) {
      const std::vector<double> products = terms(j, evidence, x);
      for (size_t t = 0; t < products.size(); ++t) {
        const double share = std::exp(products[t] - x[kInputs + j]) * slopes[kInputs + j];
        for (const int32_t f : list(j, evidence)[t]) slopes[f] += share;
      }
    }
    for (int32_t i = 0; i < kInputs; ++i) {
      double total = 0;
      for (int32_t k = 0; k < kHead; ++k) total += slopes[i / kHead * kHead + k];
      x[i] = slopes[i] - std::exp(x[i]) * total;
    }
  }

 private:
  using List = std::vector<std::vector<int32_t>>;
  std::vector<std::vector<List>> sums_;
  std::vector<int32_t> packed_;
  CircuitCounts counts_{};

  static double log_sum(const std::vector<double>& terms) {
    double sum = 0;
    for (const double term : terms) sum += std::exp(term);
    return std::log(sum);
  }
  const List& list(int32_t sum, int64_t evidence) const {
    return sums_[sum][sum < kFirst ? evidence + 1 : 0];
  }
  std::vector<double> terms(int32_t sum, int64_t evidence, const std::vector<double>& x) const {
    std::vector<double> found;
    for (const auto& term : list(sum, evidence)) {
      double product = 0;
      for (const int32_t f : term) product += x[f];
      found.push_back(product);
    }
    return found;
  }

  void pack() {
    std::vector<int32_t> selector_ptr{0}, selectors, list_ptr{0}, term_ptr{0}, factor_ptr{0};
    std::vector<int32_t> factors, order, reader_ptr{0}, readers;
    for (size_t j = 0; j < sums_.size(); ++j) {
      if (j < kFirst) selectors.insert(selectors.end(), {0, -1, 3, 1});  // -1, 0 and 1 are known
      selector_ptr.push_back(static_cast<int32_t>(selectors.size() / 4));
      for (const List& own : sums_[j]) {
        for (const auto& term : own) {
          factors.insert(factors.end(), term.begin(), term.end());
          factor_ptr.push_back(static_cast<int32_t>(factors.size()));
        }
        term_ptr.push_back(static_cast<int32_t>(factor_ptr.size() - 1));
      }
      list_ptr.push_back(static_cast<int32_t>(term_ptr.size() - 1));
      order.push_back(static_cast<int32_t>(j));
    }
    for (int32_t column = 0; column < kColumns; ++column) {
      for (size_t j = 0; j < sums_.size(); ++j) {
        for (int32_t t = term_ptr[list_ptr[j]]; t < term_ptr[list_ptr[j + 1]]; ++t) {
          for (int32_t f = factor_ptr[t]; f < factor_ptr[t + 1]; ++f) {
            if (factors[f] == column) readers.insert(readers.end(), {static_cast<int32_t>(j), t});
          }
        }
      }
      reader_ptr.push_back(static_cast<int32_t>(readers.size() / 2));
    }
    std::vector<int32_t> results{kColumns - 1, kInputs, kColumns - 1};  // one of them twice
    std::vector<int32_t> heads{0, kHead, kHead, kInputs}, levels{0, kFirst, kFirst + kSecond};
    for (const auto* part : {&results, &heads, &selector_ptr, &selectors, &list_ptr, &term_ptr,
                             &factor_ptr, &factors, &levels, &order, &reader_ptr, &readers}) {
      packed_.insert(packed_.end(), part->begin(), part->end());
    }
    const auto count = [](const std::vector<int32_t>& v) { return static_cast<int64_t>(v.size()); };
    counts_ = {kInputs,
               kResults,
               2,
               kFirst,
               count(order),
               count(term_ptr) - 1,
               count(factor_ptr) - 1,
               count(factors),
               2};
  }
};

}  // namespace sapwood::logsemiring
