// The path of a linear layer's product on this device, and how to force another one.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/cuda/linear_path.h"
#include "ops/cuda/context.h"

namespace torchweld::ops {

inline kernels::cuda::LinearDevice linear_device(const CudaContext& context) {
#if defined(TORCHWELD_HAS_SM_90A)
  const bool has_wgmma = context.capability() == 90;
#else
  const bool has_wgmma = false;
#endif
  return {.multiprocessors = context.multiprocessors(), .has_wgmma = has_wgmma};
}

// For benchmarks and tests, which name a path in the environment before a call. `device` is one
// without wgmma where the layer has no such path. Throws if the path named does not take the rows.
inline kernels::cuda::LinearPath linear_path(int64_t rows, int64_t columns,
                                             const kernels::cuda::LinearDevice& device) {
  using namespace kernels::cuda;
  const char* forced = std::getenv("TORCHWELD_CUDA_LINEAR_PATH");
  if (forced == nullptr || *forced == '\0') return choose_path(rows, columns, device);
  std::string expected;
  int index = 0;
  for (const char* name : kLinearPathNames) {
    const auto path = static_cast<LinearPath>(index++);
    if (!takes(path, rows, device)) continue;
    if (std::string(forced) == name) return path;
    (expected += name) += ' ';
  }
  throw std::runtime_error("torchweld: TORCHWELD_CUDA_LINEAR_PATH: expected one of " + expected +
                           "for this layer's " + std::to_string(rows) +
                           " rows on this device, got \"" + forced + "\"");
}

}  // namespace torchweld::ops
