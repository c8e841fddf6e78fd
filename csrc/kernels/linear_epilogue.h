// What becomes of a linear layer's sums, whatever weight they were made with.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace torchweld::kernels {

enum class LinearActivation { identity, relu, gelu, gelu_tanh, silu };

// output = activation(fma(sum * input_scale, weight_scale, bias)) + residual in float, rounded once
// to the output's dtype. Pointers are those of a block's first row and column.
struct LinearEpilogue {
  const float* input_scale;   // [rows]; null is 1
  const float* weight_scale;  // [columns]; null is 1
  const float* bias;          // [columns], or null
  LinearActivation activation;
  const void* residual;  // [rows][residual_stride] in the output's dtype, or null
  int64_t residual_stride;
  bool residual_is_float;  // in float32, though the output may not be
  void* output;
  int64_t output_stride;
};

}  // namespace torchweld::kernels
