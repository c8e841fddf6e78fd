# Defines TorchWeld::torch_stable: torch's headers and libtorch_cpu, enough for the Stable ABI.
#
# find_package(Torch) is not used on purpose. With torch's CUDA wheel it demands a CUDA toolkit, and
# a plain `pip install torch` brings that wheel to machines that have none. The Stable ABI needs
# one include directory and one library.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "import torch; print(torch.__path__[0])"
  OUTPUT_VARIABLE TORCHWELD_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE result ERROR_VARIABLE error)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "torchweld: `import torch` failed in ${Python_EXECUTABLE}; install torch there "
                      "or set Python_EXECUTABLE.\n${error}")
endif()

# The floor is declared once, as the dependency in pyproject.toml.
file(STRINGS ${PROJECT_SOURCE_DIR}/pyproject.toml dependency REGEX "^dependencies = ")
if(NOT dependency MATCHES "torch>=([0-9]+)\\.([0-9]+)")
  message(FATAL_ERROR "torchweld: no torch floor found in pyproject.toml")
endif()
set(TORCHWELD_TORCH_FLOOR ${CMAKE_MATCH_1}.${CMAKE_MATCH_2})
math(EXPR abi_target "(${CMAKE_MATCH_1} << 56) | (${CMAKE_MATCH_2} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(TorchWeld::torch_stable SHARED IMPORTED)
set_target_properties(
  TorchWeld::torch_stable
  PROPERTIES IMPORTED_LOCATION ${TORCHWELD_TORCH_ROOT}/lib/libtorch_cpu.so
             INTERFACE_INCLUDE_DIRECTORIES ${TORCHWELD_TORCH_ROOT}/include
             INTERFACE_COMPILE_DEFINITIONS TORCH_TARGET_VERSION=${abi_target}ULL)
