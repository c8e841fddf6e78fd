// What every operator on CUDA begins with.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/cuda/scratch.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// Makes a tensor's device the current one while it lives, and knows the stream torch works on
// there.
class CudaContext {
 public:
  // Throws if the tensor is elsewhere, or the driver too old for this build. `op`: for messages.
  CudaContext(const char* op, const Tensor& tensor);

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const;

  // 90 for compute capability 9.0.
  int capability() const;

  // The graph being captured on the stream, told from any other one; 0 if there is none.
  unsigned long long capture() const;

  // Throws what an error of CUDA means.
  void check(cudaError_t error) const;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_;
};

}  // namespace torchweld::ops
