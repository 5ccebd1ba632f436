# An operator is a folder csrc/ops/<op> and, where it has CUDA kernels of its own, a folder csrc/kernels/<op>. What
# several operators share is built alike, from the folders named common.

include(csrc/cmake/MuddformerHopper.cmake)

# muddformer_add_op(op [header...])
#   header...: public headers in csrc/ops/<op> beside <op>.h
# The sources of the two folders, without those of folders further down, become part of the target muddformer.
function(muddformer_add_op op)
  file(GLOB sources CONFIGURE_DEPENDS csrc/ops/${op}/*.cpp)
  if(MUDDFORMER_WITH_CUDA)
    set_property(SOURCE ${sources} APPEND PROPERTY COMPILE_DEFINITIONS MUDDFORMER_WITH_CUDA) # they may call cuda.cpp
    file(GLOB kernels CONFIGURE_DEPENDS csrc/kernels/${op}/*.cu)
    muddformer_add_hopper_code(${kernels})
    list(APPEND sources ${kernels})
  else()
    list(FILTER sources EXCLUDE REGEX "/cuda\\.cpp$")
  endif()
  target_sources(muddformer PRIVATE ${sources})
  if(NOT op STREQUAL common)
    list(APPEND ARGN ${op}.h)
  endif()
  foreach(header IN LISTS ARGN)
    configure_file(csrc/ops/${op}/${header} include/muddformer/ops/${op}/${header} COPYONLY)
  endforeach()
endfunction()
