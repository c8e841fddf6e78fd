# Sets TORCHWELD_HAS_CUDA, and with it TORCHWELD_CUDA_ARCHITECTURES: what libtorchweld_cuda.so holds,
# in words.
#
# AUTO asks for two things: a compiler, and a torch that can load the library. A developer's machine
# with a CUDA toolkit beside torch's CPU wheel need not compile what cannot run.
set(TORCHWELD_HAS_CUDA ${TORCHWELD_CUDA})
if(TORCHWELD_CUDA STREQUAL "AUTO")
  set(TORCHWELD_HAS_CUDA OFF)
  if(EXISTS ${TORCHWELD_TORCH_ROOT}/lib/libtorch_cuda.so)
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE version ERROR_QUIET)
      if(version MATCHES "release ([0-9.]+)" AND CMAKE_MATCH_1 VERSION_GREATER_EQUAL 12.1)
        set(TORCHWELD_HAS_CUDA ON)
      else()
        message(STATUS "torchweld: built without CUDA: ${CMAKE_CUDA_COMPILER} is older than 12.1")
      endif()
    endif()
  endif()
endif()
if(NOT TORCHWELD_HAS_CUDA)
  return()
endif()

# Ampere and Hopper, and for what comes after them the instructions that stay (not those of 90a). Who
# builds for the machine at hand may name its architecture alone, which takes a third of the time.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
set(names ${CMAKE_CUDA_ARCHITECTURES})
list(TRANSFORM names REPLACE "^(.+)-real$" "sm_\\1")
list(TRANSFORM names REPLACE "^(.+)-virtual$" "compute_\\1")
list(JOIN names ", " TORCHWELD_CUDA_ARCHITECTURES)
# Of a GPU of 9.0 only code for 90a has its tensor cores' own instructions.
set(TORCHWELD_HAS_SM_90A OFF)
if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
  set(TORCHWELD_HAS_SM_90A ON)
endif()
# torch's own copy of the CUDA runtime may be older or newer than the compiler: ours is in the library.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
enable_language(CUDA)
