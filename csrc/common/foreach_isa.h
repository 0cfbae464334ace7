// Includes SAPWOOD_KERNEL_FILE once per instruction set, each time with
//   SAPWOOD_ISA           the namespace to put the functions in: isa_base, isa_avx2, isa_avx512
//   SAPWOOD_TARGET        the attribute of every function of the file
//   SAPWOOD_VECTOR_BYTES  the width of a vector register
//   SAPWOOD_IS_AVX512     1 where AVX-512 intrinsics may be used
// No include guard on purpose. A target on an including function would not do: gcc lowers wide
// vectors before it inlines.
#if defined(__x86_64__)
#define SAPWOOD_ISA isa_avx512
#define SAPWOOD_TARGET SAPWOOD_TARGET_AVX512
#define SAPWOOD_VECTOR_BYTES 64
#define SAPWOOD_IS_AVX512 1
#include SAPWOOD_KERNEL_FILE
#undef SAPWOOD_ISA
#undef SAPWOOD_TARGET
#undef SAPWOOD_VECTOR_BYTES
#undef SAPWOOD_IS_AVX512

#define SAPWOOD_ISA isa_avx2
#define SAPWOOD_TARGET SAPWOOD_TARGET_AVX2
#define SAPWOOD_VECTOR_BYTES 32
#define SAPWOOD_IS_AVX512 0
#include SAPWOOD_KERNEL_FILE
#undef SAPWOOD_ISA
#undef SAPWOOD_TARGET
#undef SAPWOOD_VECTOR_BYTES
#undef SAPWOOD_IS_AVX512
#endif

#define SAPWOOD_ISA isa_base
#define SAPWOOD_TARGET
#define SAPWOOD_VECTOR_BYTES 16
#define SAPWOOD_IS_AVX512 0
#include SAPWOOD_KERNEL_FILE
#undef SAPWOOD_ISA
#undef SAPWOOD_TARGET
#undef SAPWOOD_VECTOR_BYTES
#undef SAPWOOD_IS_AVX512
#undef SAPWOOD_KERNEL_FILE
