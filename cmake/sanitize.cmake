# SAPWOOD_SANITIZE=address,undefined or thread, from the environment or as a cache variable.
set(SAPWOOD_SANITIZE "$ENV{SAPWOOD_SANITIZE}" CACHE STRING "Sanitizers to compile with")
if(SAPWOOD_SANITIZE)
  add_compile_options(
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${SAPWOOD_SANITIZE}>
    $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g>)
  add_link_options(-fsanitize=${SAPWOOD_SANITIZE})
endif()
