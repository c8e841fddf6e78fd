# Defines weld_json: nlohmann_json from WELD_JSON_INCLUDE_DIR, a CMake package, or Python's wheel.
add_library(weld_json INTERFACE)
if(NOT WELD_JSON_INCLUDE_DIR)
  find_package(nlohmann_json CONFIG QUIET)
  if(nlohmann_json_FOUND)
    target_link_libraries(weld_json INTERFACE nlohmann_json::nlohmann_json)
    return()
  endif()
  find_package(Python COMPONENTS Interpreter)
  if(Python_FOUND)
    # The wheel holds headers only, as <site-packages>/nlohmann_json/include.
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c "import nlohmann_json; print(nlohmann_json.__path__[0])"
      OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_path(WELD_JSON_HEADERS nlohmann/json.hpp HINTS ${wheel}/include)
else()
  find_path(WELD_JSON_HEADERS nlohmann/json.hpp HINTS ${WELD_JSON_INCLUDE_DIR} NO_DEFAULT_PATH)
endif()
if(NOT WELD_JSON_HEADERS)
  message(FATAL_ERROR "weld: nlohmann/json.hpp was not found: `pip install nlohmann_json`, or pass "
                      "-DWELD_JSON_INCLUDE_DIR=<directory that holds nlohmann/json.hpp>")
endif()
target_include_directories(weld_json SYSTEM INTERFACE ${WELD_JSON_HEADERS})
