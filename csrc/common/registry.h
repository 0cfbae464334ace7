// Registration macros. The emulation library compiles the CUDA sources for the host and registers
// the same ops under the namespace sapwood_emu on the CPU key.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(SAPWOOD_EMULATE)
#define SAPWOOD_NS sapwood_emu
#define SAPWOOD_DEVICE_KEY CPU
#else
#define SAPWOOD_NS sapwood
#define SAPWOOD_DEVICE_KEY CUDA
#endif

// One more level of macro expands the namespace before it is pasted.
#define SAPWOOD_LIBRARY_(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define SAPWOOD_LIBRARY(m) SAPWOOD_LIBRARY_(SAPWOOD_NS, m)
#define SAPWOOD_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define SAPWOOD_CPU_IMPL(m) SAPWOOD_IMPL_(SAPWOOD_NS, CPU, m)
#define SAPWOOD_CUDA_IMPL(m) SAPWOOD_IMPL_(SAPWOOD_NS, SAPWOOD_DEVICE_KEY, m)
