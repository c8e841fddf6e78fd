// Tiles of packed linear weights as floats, in the layout gemm.h multiplies by: what a second
// cache holds, never a whole weight.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/gemm.h"

namespace torchweld::kernels {

// output[n * kPanel + k] = the weight of column n and input feature first + k, for n < columns: a
// panel of gemm.h for the gradient. 64 of k are written, of which at least one exists.
struct DequantizeBackward {
  const int8_t* panels;
  int64_t quads;
  int64_t first;  // a multiple of 64
  int64_t columns;
  const float* weight_scale;  // [columns]
  float* output;
};

struct DequantizeInt4Backward {
  const uint8_t* panels;
  const BFloat16* weight_scale;  // [panel][groups][16]
  const uint8_t* weight_zero;
  int64_t groups;
  int64_t group_size;
  int64_t first;  // a multiple of 64
  int64_t columns;
  float* output;
};

struct DequantizeKernels {
  void (*backward)(const DequantizeBackward&);
  void (*int4_backward)(const DequantizeInt4Backward&);
  // to[i] = float(from[i])
  void (*widen[kDTypeCount])(const void* from, int64_t size, float* to);
  // to[i] = from[i] rounded
  void (*narrow[kDTypeCount])(const float* from, int64_t size, void* to);
};

}  // namespace torchweld::kernels
