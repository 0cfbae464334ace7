// Which vector instructions to use, and how one loop body becomes one function per instruction set.
//
// Two ways, both explicit because an ifunc resolver (target_clones) runs at load time, where
// SAPWOOD_CPU_CAPABILITY cannot be obeyed:
//   SAPWOOD_SIMD            for a loop that gcc vectorises by itself: one body, inlined per target;
//   foreach_isa.h           for kernels written on vectors: the file is compiled once per target.
#pragma once

#include <cstdlib>
#include <cstring>

namespace sapwood {

enum class Isa { base, avx2, avx512 };

namespace detail {

inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

inline Isa allowed_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("SAPWOOD_CPU_CAPABILITY");
  if (wanted == nullptr) return best;
  if (std::strcmp(wanted, "default") == 0) return Isa::base;
  if (std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) return Isa::avx2;
  return best;
}

}  // namespace detail

// The best instruction set of this CPU, SAPWOOD_CPU_CAPABILITY (default, avx2, avx512) being an
// upper bound that is read once.
inline Isa isa() {
  static const Isa chosen = detail::allowed_isa();
  return chosen;
}

}  // namespace sapwood

#define SAPWOOD_INLINE __attribute__((always_inline)) inline
// For what several large functions call: one copy of it instead of one in each.
#define SAPWOOD_OUTLINE __attribute__((noinline))

#if defined(__x86_64__)
#define SAPWOOD_TARGET_AVX2 __attribute__((target("avx2,fma,bmi,popcnt")))
#define SAPWOOD_TARGET_AVX512                                               \
  __attribute__((                                                           \
      target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2,popcnt," \
             "prefer-vector-width=512")))
// Defines `name params`, which runs `name_body args` compiled for isa(). The body is an
// always_inline function without lambdas: a lambda does not inherit the target.
#define SAPWOOD_SIMD(name, params, args)              \
  namespace name##_isa {                              \
    SAPWOOD_TARGET_AVX2 inline void avx2 params {     \
      name##_body args;                               \
    }                                                 \
    SAPWOOD_TARGET_AVX512 inline void avx512 params { \
      name##_body args;                               \
    }                                                 \
    inline void base params {                         \
      name##_body args;                               \
    }                                                 \
  }                                                   \
  inline void name params {                           \
    switch (::sapwood::isa()) {                       \
      case ::sapwood::Isa::avx512:                    \
        return name##_isa::avx512 args;               \
      case ::sapwood::Isa::avx2:                      \
        return name##_isa::avx2 args;                 \
      default:                                        \
        return name##_isa::base args;                 \
    }                                                 \
  }
// Calls isa_avx512::call, isa_avx2::call or isa_base::call: functions of files that went through
// foreach_isa.h.
#define SAPWOOD_ISA_CALL(...)    \
  switch (::sapwood::isa()) {    \
    case ::sapwood::Isa::avx512: \
      isa_avx512::__VA_ARGS__;   \
      break;                     \
    case ::sapwood::Isa::avx2:   \
      isa_avx2::__VA_ARGS__;     \
      break;                     \
    default:                     \
      isa_base::__VA_ARGS__;     \
  }
#else
#define SAPWOOD_SIMD(name, params, args) \
  inline void name params {              \
    name##_body args;                    \
  }
#define SAPWOOD_ISA_CALL(...) isa_base::__VA_ARGS__
#endif
