// The linear layer with an int8 weight, packed as quantized_linear.h says, and float activations.
#pragma once

#include "kernels/linear_epilogue.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels {

// Rows as the product of few of them reads them: eight at a time, or as many as are left, with
// their values of one input feature side by side.
inline constexpr int64_t kInterleavedRows = 8;
struct InterleaveRows {
  const void* input;
  int64_t input_stride;
  int64_t rows;
  int64_t in_features;
  float* output;  // [rows * in_features]
};

// A block of the product: all given rows times the panels that hold columns [0, columns).
struct WeightOnlyBlock {
  const float* input;  // interleaved
  int64_t rows;
  int64_t in_features;
  const int8_t* panels;
  int64_t columns;
  LinearEpilogue epilogue;
};

// Each sum is one chain of fused multiply-adds in the order of k: the same bits on every
// instruction set, however rows and columns are divided into calls.
struct WeightOnlyKernels {
  void (*interleave[kDTypeCount])(const InterleaveRows&);
  // The epilogue of the sums; output of the dtype indexed.
  void (*multiply[kDTypeCount])(const WeightOnlyBlock&);
};

}  // namespace torchweld::kernels
