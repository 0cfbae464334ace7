// Philox4x32-10 (Salmon et al. 2011): a random number as a function of key and counter, the same on
// every device and for every number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SAPWOOD_BOTH __host__ __device__
#else
#define SAPWOOD_BOTH
#endif

namespace sapwood::logsemiring {

SAPWOOD_BOTH inline uint32_t philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                    uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// -log of a standard exponential number, from 32 random bits; double, so that no tail is cut.
SAPWOOD_BOTH inline double gumbel(uint32_t bits) {
  const double uniform = (static_cast<double>(bits) + 0.5) * 0x1p-32;
  return -std::log(-std::log1p(-uniform));
}

}  // namespace sapwood::logsemiring
