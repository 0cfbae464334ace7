# Defines the interface target torch_stable: the headers of libtorch's stable ABI and libtorch_cpu.
# No find_package(Torch): it pulls in Caffe2's scripts and asks for a complete CUDA toolkit.
if(NOT TORCH_DIR)
  message(FATAL_ERROR "sapwood: set TORCH_DIR to the directory of an installed torch package")
endif()

file(READ "${TORCH_DIR}/include/torch/headeronly/version.h" _version_header)
string(REGEX MATCH "TORCH_VERSION_MAJOR ([0-9]+)" _ "${_version_header}")
set(_major ${CMAKE_MATCH_1})
string(REGEX MATCH "TORCH_VERSION_MINOR ([0-9]+)" _ "${_version_header}")
set(SAPWOOD_TORCH_VERSION "${_major}.${CMAKE_MATCH_1}")
if(SAPWOOD_TORCH_VERSION VERSION_LESS 2.10)
  message(FATAL_ERROR "sapwood: torch headers under ${TORCH_DIR} are version "
                      "${SAPWOOD_TORCH_VERSION}; 2.10 or newer is needed.")
endif()
message(STATUS "sapwood: torch headers ${SAPWOOD_TORCH_VERSION} under ${TORCH_DIR}")

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable INTERFACE ${PROJECT_SOURCE_DIR}/csrc)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_DIR}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020A000000000000)
# libtorch_cpu is found by its soname, which `import torch` has loaded: no RPATH is needed.
target_link_libraries(torch_stable INTERFACE ${TORCH_DIR}/lib/libtorch_cpu.so ${CMAKE_DL_LIBS})
