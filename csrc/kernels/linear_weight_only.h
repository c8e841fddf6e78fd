// The linear layer with an int8 weight, packed as quantized_linear.h says, and float activations.
#pragma once

#include "kernels/linear_epilogue.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels {

// A block of the product: all given rows times the panels that hold columns [0, columns).
struct WeightOnlyBlock {
  const float* input;
  int64_t input_stride;
  int64_t rows;
  int64_t in_features;
  const int8_t* panels;
  int64_t columns;
  LinearEpilogue epilogue;
};

// Sums that gemm.h's product made of dequantize.h's tiles.
struct WeightOnlySums {
  const float* sums;  // [rows][kPanel]
  int64_t rows;
  int64_t columns;
  LinearEpilogue epilogue;
};

// Each sum is one chain of fused multiply-adds in the order of k, in both: the same bits on every
// instruction set, however rows and columns are divided into calls.
struct WeightOnlyKernels {
  // The epilogue of the sums; output of the dtype indexed.
  void (*multiply[kDTypeCount])(const WeightOnlyBlock&);
  void (*finish[kDTypeCount])(const WeightOnlySums&);
};

}  // namespace torchweld::kernels
