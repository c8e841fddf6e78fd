// The int4 linear layer on raw memory: 4-bit weights in groups along K, 8-bit activations.
//
// A weight is (u - zero) * scale with u and zero in 0..15, and one scale and zero for every column
// and group of K. Packed, a panel holds 16 columns as [groups * group_size / 8][16][4] bytes: byte
// i of octet j holds k = 8 j + i of its column in the low bits, 8 j + 4 + i in the high ones.
// Scales and zeros are [groups][16] a panel. What pads a panel has the scale 0, and what pads K
// meets activations of 0. Every instruction set reads this one layout.
#pragma once

#include "kernels/linear_epilogue.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels {

inline constexpr int64_t kOctet = 2 * kQuad;

// Largest group whose sums stay within int32, those of the high bits counted 16 times.
inline constexpr int64_t kMaxInt4Group = 1 << 17;

// Rows that QuantizedLinearKernels::quantize wrote, to be made ready in place: the stride is
// groups * group_size at least.
struct PrepareInt4Rows {
  int8_t* quantized;
  int64_t quantized_stride;
  int64_t rows;
  int64_t in_features;
  int64_t groups;
  int64_t group_size;
  int32_t* group_sum;  // [rows][groups], of the activations
};

// A block of the product: all given rows times the panels that hold columns [0, columns).
struct LinearInt4Block {
  const int8_t* quantized;  // prepared
  int64_t quantized_stride;
  const int32_t* group_sum;
  int64_t rows;
  const uint8_t* panels;
  const BFloat16* weight_scale;
  const uint8_t* weight_zero;
  int64_t groups;
  int64_t group_size;
  int64_t columns;
  LinearEpilogue epilogue;
};

// All are safe to call at once on disjoint outputs, and no result depends on how rows and panels
// are divided into calls.
struct LinearInt4Kernels {
  void (*prepare)(const PrepareInt4Rows&);
  // With sum_g the exact integer sum of q * (u - zero) over group g, and
  //   total = fma(float(sum_g), scale_g, total)   in the order of the groups, from 0:
  // and the epilogue of the totals; output of the dtype indexed.
  void (*multiply[kDTypeCount])(const LinearInt4Block&);
  // The sums alone, int32 [rows][groups][output_stride]; only `columns` are written.
  void (*accumulate)(const LinearInt4Block&, int32_t* sums, int64_t stride);
};

}  // namespace torchweld::kernels
