// The end of a linear layer on CUDA, as a launcher is given it.
#pragma once

#include <cuda_runtime.h>

#include "kernels/linear_epilogue.h"

namespace torchweld::kernels::cuda {

// `of` says where; its bias is null, and `bias` has what there is, in any dtype.
struct LinearEnd {
  LinearEpilogue of;
  const void* bias;
  DType bias_dtype;
  DType output_dtype;
  bool stores_sums;  // the output is int32: the sums, and nothing else is read
};

}  // namespace torchweld::kernels::cuda
