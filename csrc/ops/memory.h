// Memory for activations and their gradients.
//
// malloc maps every large block afresh and the first touch of each page is a fault: on a tensor of
// 25 MB that costs several times the pass that writes it, at every step of a training run. Large
// tensors of ours lie in blocks of huge pages instead, which return to a pool when torch frees
// them.
#pragma once

#include "ops/torch_compat.h"

namespace torchweld::ops {

// Bytes of the smallest tensor that lies in huge pages. Below this malloc does well: it reuses
// small blocks without giving them back.
inline constexpr int64_t kSmallestPooled = int64_t{1} << 20;

// An uninitialized tensor of a floating point type or of bytes on the CPU, contiguous or, with 4
// dimensions, channels_last.
Tensor empty(const IntList& sizes, ScalarType type, torch::headeronly::MemoryFormat format);

// Gives memory back to the system until the pool holds no more than it may.
void trim_memory_pool();

}  // namespace torchweld::ops
