# Finds the headers of nlohmann/json 3.10 or newer, which the build alone needs: sets MUDDFORMER_JSON_INCLUDE_DIR.
#
# Looked for, in this order: MUDDFORMER_JSON_INCLUDE_DIR (a folder with nlohmann/json.hpp), find_package (Debian's
# nlohmann-json3-dev and the like), the pip package nlohmann-json of the Python in use.
set(MUDDFORMER_JSON_INCLUDE_DIR "" CACHE PATH "Folder with nlohmann/json.hpp; empty: looked for")

if(NOT MUDDFORMER_JSON_INCLUDE_DIR)
  find_package(nlohmann_json 3.10 CONFIG QUIET)
  if(nlohmann_json_FOUND)
    get_target_property(MUDDFORMER_JSON_INCLUDE_DIR nlohmann_json::nlohmann_json INTERFACE_INCLUDE_DIRECTORIES)
  endif()
endif()
foreach(python IN ITEMS "${Python_EXECUTABLE}" python3 python)
  if(python AND NOT MUDDFORMER_JSON_INCLUDE_DIR)
    execute_process(
      COMMAND
        "${python}" -c
        "import importlib.util as u; s = u.find_spec('nlohmann_json'); print(s.submodule_search_locations[0] + '/include' if s else '')"
      OUTPUT_VARIABLE MUDDFORMER_JSON_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endforeach()
if(NOT EXISTS "${MUDDFORMER_JSON_INCLUDE_DIR}/nlohmann/json.hpp")
  message(
    FATAL_ERROR
      "muddformer: the headers of nlohmann/json were not found. Install them with pip install nlohmann-json (or apt-get "
      "install nlohmann-json3-dev), or pass -DMUDDFORMER_JSON_INCLUDE_DIR=<folder with nlohmann/json.hpp>.")
endif()
message(STATUS "muddformer: nlohmann/json in ${MUDDFORMER_JSON_INCLUDE_DIR}")
