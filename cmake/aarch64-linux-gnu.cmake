# Compiles for aarch64 Linux on another machine; tools/cross_aarch64.sh gives the paths that belong to it.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)

set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++) # nvcc ignores a -ccbin among the flags

set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
