# SAPWOOD_SANITIZE=address,undefined or thread, from the environment or as a cache variable.
set(SAPWOOD_SANITIZE "$ENV{SAPWOOD_SANITIZE}" CACHE STRING "Sanitizers to compile with")
option(SAPWOOD_COVERAGE "Count the lines that run" OFF)
set(SAPWOOD_OPTIMISE -O3)
if(SAPWOOD_SANITIZE)
  set(SAPWOOD_OPTIMISE -O1)
  add_compile_options(
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${SAPWOOD_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>)
  add_link_options(-fsanitize=${SAPWOOD_SANITIZE})
endif()
if(SAPWOOD_COVERAGE)
  set(SAPWOOD_OPTIMISE -O1)
  add_compile_options(
    $<$<COMPILE_LANGUAGE:CXX>:--coverage> $<$<COMPILE_LANGUAGE:CXX>:-fprofile-update=atomic>)
  add_link_options(--coverage)
endif()
