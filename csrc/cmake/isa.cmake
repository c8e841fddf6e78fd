# torchweld_add_isa(<name> <flags>...): compile every kernel source once more for one instruction set.
#
# Only the object library made here carries -m flags. A target-wide flag would let the compiler use
# AVX-512 in code that runs before the capability check, and the process would die with SIGILL on
# an older CPU.
function(torchweld_add_isa name)
  set(target torchweld_kernels_${name})
  add_library(${target} OBJECT ${TORCHWELD_KERNEL_SOURCES})
  target_compile_definitions(${target} PRIVATE TORCHWELD_ISA=${name})
  target_compile_options(${target} PRIVATE ${TORCHWELD_KERNEL_FLAGS} ${ARGN})
  target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
  target_link_libraries(torchweld_kernels PRIVATE ${target})
endfunction()
