// The path of a linear layer's product on this device, and how to force another one.
#pragma once

#include <cstdlib>
#include <sstream>
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
// without wgmma where the layer has no such path.
inline kernels::cuda::LinearPath linear_path(int64_t rows, int64_t columns,
                                             const kernels::cuda::LinearDevice& device) {
  using kernels::cuda::LinearPath;
  const char* name = std::getenv("TORCHWELD_CUDA_LINEAR_PATH");
  if (name == nullptr || *name == '\0') return kernels::cuda::choose_path(rows, columns, device);
  constexpr const char* kNames[kernels::cuda::kLinearPaths] = {
      "few_rows", "small_tiles", "large_tiles", "warpgroups", "wide_warpgroups"};
  for (int i = 0; i < kernels::cuda::kLinearPaths; ++i) {
    const auto path = static_cast<LinearPath>(i);
    const bool fits = (path != LinearPath::few_rows || rows <= kernels::cuda::kFewRows) &&
                      (device.has_wgmma || !kernels::cuda::needs_wgmma(path));
    if (std::string(name) == kNames[i] && fits) return path;
  }
  std::ostringstream out;
  out << "torchweld: TORCHWELD_CUDA_LINEAR_PATH: expected one of";
  for (const char* known : kNames) out << " " << known;
  out << " that takes " << rows << " rows on this device, got \"" << name << "\"";
  throw std::runtime_error(out.str());
}

}  // namespace torchweld::ops
