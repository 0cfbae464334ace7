// The tables of a sum-product circuit, as LogCircuit packs them into one int32 tensor.
//
// A row of the circuit has columns: first its inputs, then one per sum. A sum has lists of terms, of
// which the row's evidence selects one; a term is the product of factors, which are columns further
// left. All pointers are CSR: the entries of i are ptr[i] ... ptr[i + 1] - 1.
// No torch header here.
#pragma once

#include <cstdint>

#include "common/launch.h"

namespace sapwood::logsemiring {

// Sizes, in the order of the op's argument `counts`.
struct CircuitCounts {
  int64_t inputs, results, heads, selectors, sums, lists, terms, factors, levels;

  SAPWOOD_HD int64_t columns() const { return inputs + sums; }
  SAPWOOD_HD int64_t packed() const {  // entries of the packed tables
    return results + 2 * heads + (sums + 1) + 4 * selectors + (sums + 1) + (lists + 1) +
           (terms + 1) + factors + (levels + 1) + sums + (columns() + 1) + 2 * factors;
  }
};

inline constexpr int64_t kCircuitCounts = sizeof(CircuitCounts) / sizeof(int64_t);

struct Circuit {
  CircuitCounts n;
  const int32_t* results;       // columns
  const int32_t* heads;         // begin and end of columns that are normalised first
  const int32_t* selector_ptr;  // by sum
  const int32_t* selectors;     // column of evidence, first value, number of values, stride
  const int32_t* list_ptr;      // by sum
  const int32_t* term_ptr;      // by list
  const int32_t* factor_ptr;    // by term
  const int32_t* factors;       // columns
  const int32_t* level_ptr;     // by level
  const int32_t* level_sums;    // sums of a level read only what lies in levels before
  const int32_t* reader_ptr;    // by column
  const int32_t* readers;       // sum and term of every factor that reads the column

  // The list that a row's evidence selects; -1 where a value is not among those of its selector.
  SAPWOOD_HD int64_t list_of(int64_t sum, const int64_t* evidence) const {
    int64_t list = list_ptr[sum];
    const int64_t end = list_ptr[sum + 1];
    for (int64_t s = selector_ptr[sum]; s < selector_ptr[sum + 1]; ++s) {
      const int32_t* selector = selectors + 4 * s;
      const uint64_t place = static_cast<uint64_t>(evidence[selector[0]]) -
                             static_cast<uint64_t>(int64_t{selector[1]});
      if (place >= static_cast<uint64_t>(int64_t{selector[2]})) return -1;
      list += static_cast<int64_t>(place) * selector[3];
      if (list >= end) return -1;  // here: many selectors could overflow
    }
    return list < end ? list : -1;
  }
};

inline Circuit unpack_circuit(const int32_t* packed, const CircuitCounts& n) {
  Circuit c{};
  c.n = n;
  const auto take = [&](int64_t count) {
    const int32_t* from = packed;
    packed += count;
    return from;
  };
  c.results = take(n.results);
  c.heads = take(2 * n.heads);
  c.selector_ptr = take(n.sums + 1);
  c.selectors = take(4 * n.selectors);
  c.list_ptr = take(n.sums + 1);
  c.term_ptr = take(n.lists + 1);
  c.factor_ptr = take(n.terms + 1);
  c.factors = take(n.factors);
  c.level_ptr = take(n.levels + 1);
  c.level_sums = take(n.sums);
  c.reader_ptr = take(n.columns() + 1);
  c.readers = take(2 * n.factors);
  return c;
}

}  // namespace sapwood::logsemiring
