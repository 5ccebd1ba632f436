# Compiles CPU kernels once for each instruction set; which one runs is chosen at run time.

# muddformer_add_cpu_kernels(target source...)
function(muddformer_add_cpu_kernels target)
  set(capabilities DEFAULT)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND capabilities AVX2 AVX512)
    target_compile_definitions(${target} PRIVATE MUDDFORMER_X86_KERNELS)
  endif()
  # The flags that PyTorch compiles its own kernels with.
  set(flags_DEFAULT "")
  set(flags_AVX2 -mavx2 -mfma -mf16c)
  set(flags_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
  # The order matters: where two objects hold the same inline function the linker keeps the first, which
  # must be the one of the lower instruction set.
  foreach(capability IN LISTS capabilities)
    set(objects ${target}_cpu_${capability})
    add_library(${objects} OBJECT ${ARGN})
    target_link_libraries(${objects} PRIVATE muddformer::torch)
    target_compile_definitions(${objects} PRIVATE CPU_CAPABILITY=${capability} CPU_CAPABILITY_${capability})
    # GCC 12 takes the undefined operand of its own AVX-512 intrinsics for an uninitialised variable.
    target_compile_options(${objects} PRIVATE -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -O3 -fno-math-errno
                                              ${flags_${capability}})
    if(NOT capability STREQUAL DEFAULT)
      target_compile_definitions(${objects} PRIVATE MUDDFORMER_X86_KERNELS)
    endif()
    if(MUDDFORMER_SANITIZE)
      target_compile_options(${objects} PRIVATE -fsanitize=${MUDDFORMER_SANITIZE} -fno-sanitize-recover=all)
    endif()
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
