// Switches of libtorchweld_ops.so, for the whole process. Each begins as its environment variable
// says, and may change at any time; a change acts on the calls after it.
#pragma once

#include <torchweld/export.h>

#include <cstdint>

namespace torchweld {

// Whether 3x3 convolutions may run as Winograd F(4x4, 3x3). TORCHWELD_WINOGRAD: 1 (default) or 0.
TORCHWELD_API bool winograd();
TORCHWELD_API void set_winograd(bool on);

// Which algorithm convolutions run with where it can: "auto" (default: the one the rule expects to
// be fastest), "aten" (the vendor's, through ATen), "dense", "winograd" (both of the CPU),
// "depthwise" or "cudnn" (of CUDA: a folded convolution, its bias, residual and ReLU in one).
// TORCHWELD_CONVOLUTION. Setting another name throws std::runtime_error.
TORCHWELD_API const char* convolution_algorithm();
TORCHWELD_API void set_convolution_algorithm(const char* name);

// Bytes of freed activations kept for the next ones, instead of giving them back to the system and
// faulting in fresh pages. TORCHWELD_MEMORY_POOL (default: a quarter of the machine's memory, at
// most 4 GiB). Lowering it releases what is too much; 0 releases and keeps nothing.
TORCHWELD_API int64_t memory_pool();
TORCHWELD_API void set_memory_pool(int64_t bytes);

}  // namespace torchweld
