// The C++ face of libtorchweld_ops.so. It includes no torch header, so a program can be compiled
// against it whatever torch it links.
#pragma once

#include <torchweld/export.h>

namespace torchweld {

// Version of the library, "major.minor.patch".
TORCHWELD_API const char* version();

// Lowest torch release whose Stable ABI the library is built for, "major.minor".
TORCHWELD_API const char* torch_abi_target();

// Instruction set the kernels run with: "scalar", "avx2", "avx512", "avx512_vnni" or
// "avx512_bf16". Chosen once, on first use, as the best this CPU and operating system support, or
// the one TORCHWELD_CPU_CAPABILITY names. Throws std::runtime_error when that variable names an
// unknown or unsupported one.
TORCHWELD_API const char* cpu_capability();

// Comma-separated instruction sets this build holds and this machine can run, best first.
TORCHWELD_API const char* available_cpu_capabilities();

// Comma-separated GPU architectures libtorchweld_cuda.so holds code for (sm_80), or instructions
// that a driver compiles for later ones (compute_90); empty if this build has no such library.
TORCHWELD_API const char* cuda_architectures();

// Registers the operators under torch.ops.torchweld. Loading the library does it; calling this
// keeps a linker from dropping a library of which the program names no other symbol.
TORCHWELD_API void ensure_registered();

}  // namespace torchweld
