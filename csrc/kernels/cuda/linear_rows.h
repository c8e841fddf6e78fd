// Rows of activations or gradients as tensor cores multiply them: at aligned places, zeros behind
// the last column, and floats in parts.
#pragma once

#include <cuda_runtime.h>

#include "kernels/dtype.h"

namespace torchweld::kernels::cuda {

struct LayOutRows {
  const void* input;  // [rows][stride]
  DType dtype;
  int64_t stride;
  int64_t rows;
  int64_t columns;
  void* output;           // [parts][rows][output_stride], aligned to 16
  int64_t output_stride;  // a multiple of 8
  // 1: elements as they are. Else bfloat16 numbers whose sum is the element, each cut off behind
  // its eight bits: all of a float16 in two, of a float32 in three.
  int parts;
};

cudaError_t launch_lay_out_rows(const LayOutRows&, cudaStream_t);

}  // namespace torchweld::kernels::cuda
