# The sources among these named *_hopper.cu have instructions that only compute capability 9.0 has (wgmma): beside the
# code for the architectures asked for they get some for 9.0a, where 9.0 is among these. The driver takes it where it can.
function(muddformer_add_hopper_code)
  set(sources ${ARGN})
  list(FILTER sources INCLUDE REGEX "_hopper\\.cu$")
  if(sources AND CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)(90|all)")
    set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_DEFINITIONS MUDDFORMER_SM90A)
    if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "(^|;)90a")
      set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_OPTIONS --generate-code=arch=compute_90a,code=sm_90a)
    endif()
  endif()
endfunction()
