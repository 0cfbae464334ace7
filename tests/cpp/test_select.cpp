// The loops of the exact selection against a stable sort of the floats themselves.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "select/kernel.h"

namespace {

namespace select = sapwood::select;
using select::Order;

template <class T>
struct Case {
  std::vector<T> scores;
  std::vector<uint8_t> active, kept;
  Order order;

  // Where element i stands: inactive, ranked or protected, and by which score.
  std::pair<int, T> rank(size_t i) const {
    if (!kept.empty() && kept[i]) return {2, 0};
    if (!active.empty() && !active[i]) return {0, 0};
    return {1, order == Order::absolute ? std::abs(scores[i]) : scores[i]};
  }
};

template <class T>
Case<T> random_case(std::mt19937& random, Order order, bool masked, bool guarded) {
  const T infinity = std::numeric_limits<T>::infinity();
  const T tiny = std::numeric_limits<T>::denorm_min();
  const std::vector<T> special{0, -T(0), 1, -1, infinity, -infinity, tiny, -tiny, T(0.5), T(-2)};
  Case<T> made{std::vector<T>(random() % 3000), {}, {}, order};
  for (T& score : made.scores) {
    score = random() % 2 ? special[random() % special.size()] : T(random() % 97) - T(48.5);
    if (order == Order::nonnegative) score = std::abs(score);
  }
  for (size_t i = 0; i < made.scores.size(); ++i) {
    if (masked) made.active.push_back(random() % 4 != 0);
    if (guarded) made.kept.push_back(random() % 5 == 0 && (!masked || made.active[i]));
  }
  return made;
}

// The keep mask with the first k elements of the order off, found digit by digit.
template <class I, class T>
std::vector<uint8_t> selected(const Case<T>& c, int64_t k) {
  const int64_t size = static_cast<int64_t>(c.scores.size());
  std::vector<I> bits(c.scores.size());
  std::transform(c.scores.begin(), c.scores.end(), bits.begin(),
                 [](T score) { return std::bit_cast<I>(score); });
  std::vector<uint8_t> keep(c.scores.size(), 7);
  const uint8_t* active = c.active.empty() ? nullptr : c.active.data();
  const uint8_t* kept = c.kept.empty() ? nullptr : c.kept.data();
  select::with_keys<I>(bits.data(), active, kept, c.order, [&](auto keys) {
    int64_t prefix = 0, rest = k;
    for (int shift = 8 * sizeof(I) - 16; shift >= 0; shift -= 16) {
      std::vector<int64_t> counts(select::bins);
      select::count_digits(keys, size, shift, prefix, counts.data());
      int64_t digit = 0;
      while (counts[digit] < rest) rest -= counts[digit++];
      const bool highest = shift == 8 * sizeof(I) - 16;
      prefix = highest ? digit - select::bins / 2 : prefix * select::bins + digit;
    }
    expect(select::switch_off(keys, size, prefix, rest, keep.data()) == rest, "all ties went");
  });
  return keep;
}

template <class I, class T>
void equals_a_sort(unsigned seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 200; ++round) {
    const auto order = static_cast<Order>(random() % 3);
    const Case<T> c = random_case<T>(random, order, random() % 2, random() % 2);
    std::vector<size_t> by_rank(c.scores.size());
    for (size_t i = 0; i < by_rank.size(); ++i) by_rank[i] = i;
    std::stable_sort(by_rank.begin(), by_rank.end(),
                     [&](size_t a, size_t b) { return c.rank(a) < c.rank(b); });
    const size_t free = static_cast<size_t>(std::count_if(
        by_rank.begin(), by_rank.end(), [&](size_t i) { return c.rank(i).first < 2; }));
    if (free == 0) continue;
    const size_t k = 1 + random() % free;
    std::vector<uint8_t> expected(c.scores.size(), 1);
    for (size_t i = 0; i < k; ++i) expected[by_rank[i]] = 0;
    expect(selected<I>(c, static_cast<int64_t>(k)) == expected,
           "round " + std::to_string(round) + " of seed " + std::to_string(seed));
  }
}

}  // namespace

int main() {
  equals_a_sort<int32_t, float>(1);
  equals_a_sort<int64_t, double>(2);
  if (failures == 0) std::printf("select kernels: all checks passed\n");
  return failures == 0 ? 0 : 1;
}
