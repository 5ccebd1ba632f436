# Compiles CPU kernels once for each instruction set; which one runs is chosen at run time.

# muddformer_add_cpu_kernels(target source... [AVX512_BF16 source...])
#   AVX512_BF16: sources that are compiled for that instruction set alone
function(muddformer_add_cpu_kernels target)
  cmake_parse_arguments(PARSE_ARGV 1 kernels "" "" "AVX512_BF16")
  set(capabilities DEFAULT)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
    list(APPEND capabilities AVX2 AVX512 AVX512_BF16)
    target_compile_definitions(${target} PRIVATE MUDDFORMER_X86_KERNELS)
  endif()
  # The flags that PyTorch compiles its own kernels with.
  set(flags_DEFAULT "")
  set(flags_AVX2 -mavx2 -mfma -mf16c)
  set(flags_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c)
  set(flags_AVX512_BF16 ${flags_AVX512} -mavx512bf16)
  # The order matters: where two objects hold the same inline function the linker keeps the first, which
  # must be the one of the lower instruction set.
  foreach(capability IN LISTS capabilities)
    set(sources ${kernels_UNPARSED_ARGUMENTS})
    if(capability STREQUAL AVX512_BF16)
      set(sources ${kernels_AVX512_BF16})
    endif()
    set(objects ${target}_cpu_${capability})
    add_library(${objects} OBJECT ${sources})
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
