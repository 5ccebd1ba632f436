# Finds LibTorch and defines the target muddformer::torch. Used by the build and by the installed package.
#
# find_package(Torch) of a CUDA wheel stops where there is no CUDA toolkit and rewrites architecture flags, so
# the headers and libraries are taken from the place that torch.utils.cpp_extension and TorchConfig.cmake use.
# Looked for, in this order: MUDDFORMER_TORCH_DIR (a folder with include/ and lib/), the folder of an earlier
# find_package(Torch), CMAKE_PREFIX_PATH, the hints given by the caller, the torch of Python on the PATH.
#
# Sets MUDDFORMER_TORCH_DIR, MUDDFORMER_TORCH_VERSION (major.minor.patch), MUDDFORMER_TORCH_CUDA_VERSION ("" for
# a CPU build of torch).

function(muddformer_find_torch_dir result)
  set(candidates ${MUDDFORMER_TORCH_DIR} ${TORCH_INSTALL_PREFIX})
  foreach(prefix IN LISTS CMAKE_PREFIX_PATH)
    # torch.utils.cmake_prefix_path is <torch>/share/cmake; a libtorch archive is given by its root.
    list(APPEND candidates ${prefix} ${prefix}/../.. ${prefix}/libtorch)
  endforeach()
  list(APPEND candidates ${ARGN})
  foreach(python IN ITEMS "${Python_EXECUTABLE}" python3 python)
    foreach(dir IN LISTS candidates)
      if(EXISTS "${dir}/include/torch/csrc/api/include/torch/torch.h")
        get_filename_component(dir "${dir}" ABSOLUTE)
        set(${result} "${dir}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
    if(python)
      execute_process(
        COMMAND "${python}" -c
                "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
        OUTPUT_VARIABLE candidates OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    else()
      set(candidates "")
    endif()
  endforeach()
  if(EXISTS "${candidates}/include/torch/csrc/api/include/torch/torch.h")
    set(${result} "${candidates}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

macro(muddformer_find_torch)
  muddformer_find_torch_dir(MUDDFORMER_TORCH_DIR ${ARGN})
  if(NOT MUDDFORMER_TORCH_DIR)
    message(
      FATAL_ERROR
        "muddformer: LibTorch was not found. Install torch for the Python on the PATH (pip install torch), or "
        "pass -DMUDDFORMER_TORCH_DIR=<folder with LibTorch's include/ and lib/>.")
  endif()

  file(STRINGS "${MUDDFORMER_TORCH_DIR}/include/torch/headeronly/version.h" _muddformer_lines
       REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" MUDDFORMER_TORCH_VERSION "${_muddformer_lines}")
  list(JOIN MUDDFORMER_TORCH_VERSION "." MUDDFORMER_TORCH_VERSION)

  set(MUDDFORMER_TORCH_CUDA_VERSION "")
  if(EXISTS "${MUDDFORMER_TORCH_DIR}/lib/libtorch_cuda.so")
    if(EXISTS "${MUDDFORMER_TORCH_DIR}/version.py")
      file(STRINGS "${MUDDFORMER_TORCH_DIR}/version.py" _muddformer_lines REGEX "^cuda.*=")
      string(REGEX REPLACE "^[^=]*= *'?([0-9.]*).*" "\\1" MUDDFORMER_TORCH_CUDA_VERSION "${_muddformer_lines}")
    elseif(EXISTS "${MUDDFORMER_TORCH_DIR}/build-version")
      file(STRINGS "${MUDDFORMER_TORCH_DIR}/build-version" _muddformer_lines REGEX "cu[0-9]+")
      string(REGEX REPLACE ".*cu([0-9]+)([0-9])$" "\\1.\\2" MUDDFORMER_TORCH_CUDA_VERSION "${_muddformer_lines}")
    endif()
  endif()

  if(NOT TARGET muddformer::torch)
    add_library(muddformer::torch INTERFACE IMPORTED GLOBAL)
    set_target_properties(
      muddformer::torch
      PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                 "${MUDDFORMER_TORCH_DIR}/include;${MUDDFORMER_TORCH_DIR}/include/torch/csrc/api/include"
                 INTERFACE_SYSTEM_INCLUDE_DIRECTORIES
                 "${MUDDFORMER_TORCH_DIR}/include;${MUDDFORMER_TORCH_DIR}/include/torch/csrc/api/include"
                 INTERFACE_COMPILE_FEATURES cxx_std_20)
    # libtorch.so exports its own copy of std::filesystem, which crashes where it is found before the C++ library's.
    set_property(TARGET muddformer::torch PROPERTY INTERFACE_LINK_LIBRARIES stdc++)
    # torch_cuda registers the CUDA backend when it is loaded; nothing refers to it, so the linker would drop it.
    foreach(_muddformer_library IN ITEMS torch torch_cpu torch_cuda c10 c10_cuda)
      set(_muddformer_path "${MUDDFORMER_TORCH_DIR}/lib/lib${_muddformer_library}.so")
      if(EXISTS "${_muddformer_path}")
        add_library(muddformer::lib${_muddformer_library} SHARED IMPORTED GLOBAL)
        set_target_properties(muddformer::lib${_muddformer_library} PROPERTIES IMPORTED_LOCATION "${_muddformer_path}"
                                                                           IMPORTED_NO_SONAME OFF)
        set_property(
          TARGET muddformer::torch
          APPEND
          PROPERTY INTERFACE_LINK_LIBRARIES muddformer::lib${_muddformer_library})
      endif()
    endforeach()
    set_property(TARGET muddformer::torch APPEND PROPERTY INTERFACE_LINK_OPTIONS "-Wl,--no-as-needed")
  endif()
endmacro()
