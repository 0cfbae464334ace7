// The loops of an exact selection among floats, which python/sapwood/pruning/_radix.py explains and
// has as a torch version too. One pass each: no copy of the scores, no temporary of their size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace sapwood::select {

inline constexpr int digit_bits = 16;
inline constexpr int64_t bins = int64_t{1} << digit_bits;

// What the scores are ranked by, and whether any of them has its sign bit set.
enum class Order { nonnegative, absolute, any_sign };

// The bits of some floats as integers I of the same order. Inactive elements come first, protected
// ones last.
template <class I, Order order, bool masked, bool guarded>
struct Keys {
  using Integer = I;
  static constexpr int bits = 8 * sizeof(I);

  const I* scores;
  const uint8_t* active;  // 0 or 1; read if masked
  const uint8_t* kept;    // 0 or 1; read if guarded

  I operator()(int64_t i) const {
    constexpr I largest = static_cast<I>(~(std::make_unsigned_t<I>{1} << (bits - 1)));
    I key = scores[i];
    if constexpr (order == Order::absolute) key &= largest;
    if constexpr (masked) key |= static_cast<I>(active[i]) - 1;  // -1: below the key of 0.0
    if constexpr (order == Order::any_sign) {
      // -0.0 joins 0.0; an inactive element gets -largest, below the key of -inf
      const I negative = key >> (bits - 1);
      key = ((key & largest) ^ negative) - negative;
    }
    if constexpr (guarded) key = kept[i] ? largest : key;
    return key;
  }
};

// Calls f(Keys<I, ...>{}) for the order and for the flags that are not null.
template <class I, class F>
void with_keys(const I* scores, const uint8_t* active, const uint8_t* kept, Order order, F&& f) {
  auto ordered = [&](auto chosen) {
    constexpr Order o = decltype(chosen)::value;
    if (active && kept) {
      f(Keys<I, o, true, true>{scores, active, kept});
    } else if (active) {
      f(Keys<I, o, true, false>{scores, active, kept});
    } else if (kept) {
      f(Keys<I, o, false, true>{scores, active, kept});
    } else {
      f(Keys<I, o, false, false>{scores, active, kept});
    }
  };
  switch (order) {
    case Order::nonnegative:
      return ordered(std::integral_constant<Order, Order::nonnegative>{});
    case Order::absolute:
      return ordered(std::integral_constant<Order, Order::absolute>{});
    case Order::any_sign:
      return ordered(std::integral_constant<Order, Order::any_sign>{});
  }
}

// Adds the histogram of the 16 bits at `shift` over the keys whose higher bits are `prefix` (at the
// highest digit: over all keys) to counts[0..65535]. Bins of the highest digit are in the order of
// signed integers.
template <class K>
void count_digits(K keys, int64_t size, int shift, int64_t prefix, int64_t* counts) {
  constexpr int64_t few = 64;                  // keys that are compared before any is counted
  constexpr int64_t block = int64_t{1} << 24;  // so that 32 bits hold a count
  constexpr int64_t sign = bins / 2;
  const bool highest = shift == K::bits - digit_bits;
  const int above = highest ? 0 : shift + digit_bits;
  const auto wanted = static_cast<typename K::Integer>(prefix);
  std::vector<uint32_t> table(bins);
  for (int64_t start = 0; start < size; start += block) {
    const int64_t stop = std::min(start + block, size);
    if (highest) {
      for (int64_t i = start; i < stop; ++i) ++table[(keys(i) >> shift) + sign];
    } else {
      for (int64_t i = start; i < stop; i += few) {
        const int64_t end = std::min(i + few, stop);
        typename K::Integer found = 0;
        for (int64_t j = i; j < end; ++j) found |= (keys(j) >> above) == wanted;
        if (!found) continue;
        for (int64_t j = i; j < end; ++j) {
          const auto key = keys(j);
          if ((key >> above) == wanted) ++table[(key >> shift) & (bins - 1)];
        }
      }
    }
    for (int64_t bin = 0; bin < bins; ++bin) counts[bin] += table[bin];
    std::fill(table.begin(), table.end(), 0);
  }
}

// keep[i] = 1 where the key is above `last`, and where it equals `last` but for the first `quota` of
// them. Returns how many of these there were, at most `quota`.
template <class K>
int64_t switch_off(K keys, int64_t size, int64_t last, int64_t quota, uint8_t* __restrict keep) {
  constexpr int64_t block = 1024;
  const auto cut = static_cast<typename K::Integer>(last);
  int64_t left = quota;
  for (int64_t start = 0; start < size; start += block) {
    const int64_t stop = std::min(start + block, size);
    if (left == 0) {
      for (int64_t i = start; i < stop; ++i) keep[i] = keys(i) >= cut;
      continue;
    }
    uint32_t ties = 0;
    for (int64_t i = start; i < stop; ++i) {
      keep[i] = keys(i) > cut;
      ties += keys(i) == cut;
    }
    const int64_t going = std::min<int64_t>(left, ties);
    left -= going;
    if (going == ties) continue;
    int64_t tie = 0;
    for (int64_t i = start; i < stop; ++i) keep[i] |= keys(i) == cut && ++tie > going;
  }
  return quota - left;
}

}  // namespace sapwood::select
