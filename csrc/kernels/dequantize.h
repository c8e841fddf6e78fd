// Tiles of packed linear weights as floats, in the layouts gemm.h multiplies by: what a second
// cache holds, never a whole weight.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/gemm.h"

namespace torchweld::kernels {

// output[k * kPanel + n] = q of input feature first + k and column n: a panel of gemm.h for the
// layer itself. Scales are left out, for they multiply the sums. All columns of the packed panels
// that hold [0, columns) are written, columns <= kPanel.
struct DequantizeForward {
  const int8_t* panels;  // those that hold the columns
  int64_t quads;         // of a panel
  int64_t first;         // a multiple of 4
  int64_t count;
  int64_t columns;
  float* output;
};

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
  void (*forward)(const DequantizeForward&);
  void (*backward)(const DequantizeBackward&);
  void (*int4_backward)(const DequantizeInt4Backward&);
  // to[i] = float(from[i])
  void (*widen[kDTypeCount])(const void* from, int64_t size, float* to);
  // to[i] = from[i] rounded
  void (*narrow[kDTypeCount])(const float* from, int64_t size, void* to);
};

}  // namespace torchweld::kernels
