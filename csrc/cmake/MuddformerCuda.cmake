# Decides whether the CUDA kernels are built: MUDDFORMER_CUDA is AUTO, ON or OFF.
#
# Sets MUDDFORMER_WITH_CUDA, MUDDFORMER_CUDA_VERSION, MUDDFORMER_CUDA_MAJOR, MUDDFORMER_CUDA_ARCHITECTURES.

set(MUDDFORMER_WITH_CUDA OFF)
set(MUDDFORMER_CUDA_VERSION "")
set(MUDDFORMER_CUDA_MAJOR "")
set(MUDDFORMER_CUDA_ARCHITECTURES "")
string(TOUPPER "${MUDDFORMER_CUDA}" MUDDFORMER_CUDA)
if(NOT MUDDFORMER_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "muddformer: MUDDFORMER_CUDA: expected AUTO, ON or OFF, got ${MUDDFORMER_CUDA}.")
endif()

set(reason "")
if(MUDDFORMER_CUDA STREQUAL OFF)
  set(reason "MUDDFORMER_CUDA is OFF")
elseif(NOT MUDDFORMER_TORCH_CUDA_VERSION)
  set(reason "torch ${MUDDFORMER_TORCH_VERSION} in ${MUDDFORMER_TORCH_DIR} has no CUDA")
else()
  if(DEFINED ENV{CUDA_HOME} AND NOT CUDAToolkit_ROOT) # as torch.utils.cpp_extension has it
    set(CUDAToolkit_ROOT "$ENV{CUDA_HOME}")
  endif()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_FOUND OR NOT CUDAToolkit_NVCC_EXECUTABLE)
    set(reason "no CUDA toolkit (nvcc) was found on the PATH or in CUDA_HOME")
  elseif(NOT MUDDFORMER_TORCH_CUDA_VERSION MATCHES "^${CUDAToolkit_VERSION_MAJOR}\\.")
    message(
      FATAL_ERROR
        "muddformer: torch ${MUDDFORMER_TORCH_VERSION} was built with CUDA ${MUDDFORMER_TORCH_CUDA_VERSION}, but the "
        "toolkit in ${CUDAToolkit_BIN_DIR} is CUDA ${CUDAToolkit_VERSION}: install a toolkit of the same major version, "
        "or build for the CPU with MUDDFORMER_CUDA=OFF.")
  endif()
endif()

if(reason)
  if(MUDDFORMER_CUDA STREQUAL ON)
    message(FATAL_ERROR "muddformer: MUDDFORMER_CUDA is ON, but ${reason}.")
  endif()
  message(STATUS "muddformer: CPU build, because ${reason}")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  if(DEFINED ENV{CUDAARCHS})
    set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
  elseif(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
    # "8.0 9.0+PTX" -> 80-real;90
    string(REGEX REPLACE "[ ;]+" ";" _architectures "$ENV{TORCH_CUDA_ARCH_LIST}")
    set(CMAKE_CUDA_ARCHITECTURES "")
    foreach(_architecture IN LISTS _architectures)
      if(NOT _architecture MATCHES "^([0-9]+)\\.([0-9])(a?)(\\+PTX)?$")
        message(FATAL_ERROR "muddformer: TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 9.0+PTX, got ${_architecture}.")
      endif()
      set(_number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
      if(CMAKE_MATCH_4)
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number})
      else()
        list(APPEND CMAKE_CUDA_ARCHITECTURES ${_number}-real)
      endif()
    endforeach()
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90) # machine code for both, PTX of the newer one for what follows
  endif()
endif()

set(CMAKE_CUDA_COMPILER "${CUDAToolkit_NVCC_EXECUTABLE}")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Shared) # the one that torch has loaded

set(MUDDFORMER_WITH_CUDA ON)
set(MUDDFORMER_CUDA_VERSION "${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR}")
set(MUDDFORMER_CUDA_MAJOR "${CUDAToolkit_VERSION_MAJOR}")
set(MUDDFORMER_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "muddformer: CUDA ${MUDDFORMER_CUDA_VERSION} for architectures ${CMAKE_CUDA_ARCHITECTURES}")
