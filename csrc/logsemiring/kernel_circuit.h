// One row of a sum-product circuit, there and back. Values and slopes are kept in double, so that the
// error of a long chain of sums is that of its exponentials alone, which are taken in T on vectors.
// No torch header here; nothing allocates.
#pragma once

#include <cmath>

#include "logsemiring/circuit.h"
#include "logsemiring/kernel.h"

namespace sapwood::logsemiring {

// Whether the tables hold together: pointers rise from 0 to their ends, columns and selectors exist.
// Signs are collected instead of tested: without a branch gcc makes vectors of these loops.
inline bool circuit_is_sound(const Circuit& c, int64_t evidence_columns) {
  const auto rises = [](const int32_t* ptr, int64_t count, int64_t end) {
    uint32_t falls = 0;
    for (int64_t i = 0; i < count; ++i) {
      falls |= static_cast<uint32_t>(ptr[i]) | static_cast<uint32_t>(ptr[i + 1] < ptr[i]) << 31;
    }
    return ptr[0] == 0 && ptr[count] == end && falls >> 31 == 0;
  };
  const auto inside = [](const int32_t* from, int64_t count, int64_t end) {
    uint32_t outside = 0;
    for (int64_t i = 0; i < count; ++i) {
      outside |= static_cast<uint32_t>(from[i] < 0) | static_cast<uint32_t>(from[i] >= end);
    }
    return outside == 0;
  };
  bool sound = rises(c.selector_ptr, c.n.sums, c.n.selectors) &&
               rises(c.list_ptr, c.n.sums, c.n.lists) && rises(c.term_ptr, c.n.lists, c.n.terms) &&
               rises(c.factor_ptr, c.n.terms, c.n.factors) &&
               inside(c.results, c.n.results, c.n.columns());
  for (int64_t s = 0; sound && s < c.n.selectors; ++s) {
    sound = inside(c.selectors + 4 * s, 1, evidence_columns) && c.selectors[4 * s + 2] >= 0 &&
            c.selectors[4 * s + 3] >= 0;
  }
  for (int64_t h = 0; sound && h < c.n.heads; ++h) {
    const int32_t begin = c.heads[2 * h], end = c.heads[2 * h + 1];
    sound = begin >= 0 && begin <= end && end <= c.n.inputs;
  }
  for (int64_t j = 0; sound && j < c.n.sums; ++j) {
    const int64_t first = c.factor_ptr[c.term_ptr[c.list_ptr[j]]];
    const int64_t last = c.factor_ptr[c.term_ptr[c.list_ptr[j + 1]]];
    sound = inside(c.factors + first, last - first, c.n.inputs + j);
  }
  return sound;
}

inline int64_t longest_list(const Circuit& c) {
  int64_t most = 0;
  for (int64_t l = 0; l < c.n.lists; ++l)
    most = std::max<int64_t>(most, c.term_ptr[l + 1] - c.term_ptr[l]);
  for (int64_t h = 0; h < c.n.heads; ++h)
    most = std::max<int64_t>(most, c.heads[2 * h + 1] - c.heads[2 * h]);
  return most;
}

// What a row is walked with.
template <class T>
struct CircuitWalk {
  double *values, *slopes;  // (columns) each
  double* terms;            // (longest list)
  T* scaled;                // (longest list, and a strip beyond)
};

// The maximum of w.terms, and the sum of exp(term - maximum), which go to w.scaled. Without mass the
// sum is 0; with +inf these terms count 1 and the others 0; with NaN the sum is NaN.
template <class T>
T reduce_walk(const CircuitWalk<T>& w, int64_t count, double* top) {
  double most = -kInf<double>;
  bool nan = false;
  for (int64_t i = 0; i < count; ++i) {
    most = w.terms[i] > most ? w.terms[i] : most;
    nan = nan || w.terms[i] != w.terms[i];
  }
  *top = nan ? std::nan("") : most;
  if (nan || most == kInf<double> || most == -kInf<double>) {
    T sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool one = most == kInf<double> && w.terms[i] == most;
      w.scaled[i] = nan ? std::numeric_limits<T>::quiet_NaN() : one ? T(1) : T(0);
      sum += w.scaled[i];
    }
    return sum;
  }
  for (int64_t i = 0; i < count; ++i) w.scaled[i] = static_cast<T>(w.terms[i] - most);
  T zero, sum = 0;
  SAPWOOD_ISA_CALL(reduce_terms(w.scaled, count, &zero, &sum));
  return sum;
}

// The terms of a list, and how many they are.
template <class T>
int64_t list_terms(const Circuit& c, int64_t list, const CircuitWalk<T>& w) {
  const int64_t first = c.term_ptr[list], count = c.term_ptr[list + 1] - first;
  for (int64_t t = 0; t < count; ++t) {
    double product = 0;
    for (int64_t f = c.factor_ptr[first + t]; f < c.factor_ptr[first + t + 1]; ++f) {
      product += w.values[c.factors[f]];
    }
    w.terms[t] = product;
  }
  return count;
}

// Turns the inputs in w.values into those that the sums read, and fills in the sums.
template <class T>
void circuit_row(const Circuit& c, const int64_t* evidence, const CircuitWalk<T>& w) {
  for (int64_t h = 0; h < c.n.heads; ++h) {
    const int64_t begin = c.heads[2 * h], end = c.heads[2 * h + 1];
    for (int64_t i = begin; i < end; ++i) w.scaled[i - begin] = static_cast<T>(w.values[i]);
    T top, sum = 0;
    SAPWOOD_ISA_CALL(reduce_terms(w.scaled, end - begin, &top, &sum));
    const bool finite = top > -kInf<T> && top < kInf<T>;
    const double total = finite ? static_cast<double>(math::log(sum)) : std::nan("");
    for (int64_t i = begin; i < end; ++i) w.values[i] -= static_cast<double>(top) + total;
  }
  for (int64_t j = 0; j < c.n.sums; ++j) {
    double value = -kInf<double>;
    const int64_t list = c.list_of(j, evidence);
    if (list >= 0) {
      double top;
      const T sum = reduce_walk(w, list_terms(c, list, w), &top);
      const bool finite = top > -kInf<double> && top < kInf<double>;
      value = finite ? top + static_cast<double>(math::log(sum)) : top;
    }
    w.values[c.n.inputs + j] = value;
  }
}

// Given the slopes of the results, those of the inputs; of a row that circuit_row has filled.
template <class T>
void circuit_row_back(const Circuit& c, const int64_t* evidence, const CircuitWalk<T>& w) {
  for (int64_t j = c.n.sums - 1; j >= 0; --j) {
    const double slope = w.slopes[c.n.inputs + j];
    const int64_t list = slope == 0 ? -1 : c.list_of(j, evidence);
    if (list < 0) continue;
    double top;
    const int64_t first = c.term_ptr[list], count = list_terms(c, list, w);
    const T sum = reduce_walk(w, count, &top);
    if (sum == 0) continue;
    const double factor = slope / static_cast<double>(sum);
    for (int64_t t = 0; t < count; ++t) {
      const double share = factor * static_cast<double>(w.scaled[t]);
      for (int64_t f = c.factor_ptr[first + t]; f < c.factor_ptr[first + t + 1]; ++f) {
        w.slopes[c.factors[f]] += share;
      }
    }
  }
  for (int64_t h = 0; h < c.n.heads; ++h) {
    const int64_t begin = c.heads[2 * h], end = c.heads[2 * h + 1];
    double total = 0;
    for (int64_t i = begin; i < end; ++i) total += w.slopes[i];
    for (int64_t i = begin; i < end; ++i) {
      w.slopes[i] -= static_cast<double>(math::exp(static_cast<T>(w.values[i]))) * total;
    }
  }
}

}  // namespace sapwood::logsemiring
