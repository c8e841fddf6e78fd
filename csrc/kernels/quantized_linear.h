// The int8 linear layer on raw memory: what a kernel is given, and the table of kernels an
// instruction set provides.
//
// Activations are quantized per row, weights per output column, both symmetrically to [-127, 127].
// A packed weight of N columns and K rows is int8 [ceil(N/16)][ceil(K/4)][16][4], zero padded: a
// panel holds 16 columns, a quad four consecutive k of one column. Every instruction set reads this
// one layout, so a packed weight moves between machines.
#pragma once

#include <cstdint>

#include "kernels/linear_epilogue.h"

namespace torchweld::kernels {

inline constexpr int64_t kPanelColumns = 16;
inline constexpr int64_t kQuad = 4;

// Largest K for which sums of K products within 127 * 127 fit int32, and for which sums of K
// weights do.
inline constexpr int64_t kMaxSummed = INT32_MAX / (127 * 127);
inline constexpr int64_t kMaxInFeatures = 1 << 24;

// Rows to quantize. A quantized row is opaque: only the kernels of the same instruction set read
// it. Whole quads are written, so its stride is K rounded up to kQuad at least.
struct QuantizeRows {
  const void* input;  // rows of in_features consecutive elements
  int64_t input_stride;
  int64_t rows;
  int64_t in_features;
  int8_t* quantized;
  int64_t quantized_stride;
  float* scale;        // [rows][groups]
  int64_t group_size;  // 0: the row is one group; else a multiple of kQuad
};

// A block of the product: all given rows times the panels that hold columns [0, columns).
struct QuantizedLinearBlock {
  const int8_t* quantized;
  int64_t quantized_stride;
  int64_t rows;
  const int8_t* panels;
  const int32_t* weight_sum;  // sum over k of each column, padded to whole panels
  int64_t quads;              // ceil(K / 4)
  int64_t columns;
  int64_t group_quads;       // 0: a row has one scale, the epilogue's
  const float* group_scale;  // [rows][groups] otherwise, and the epilogue has none
  LinearEpilogue epilogue;
};

// All are safe to call at once on disjoint outputs, and no result depends on how rows and panels
// are divided into calls.
struct QuantizedLinearKernels {
  // scale = max(absmax / 127, FLT_MIN) and q = round_half_even(x * (1 / scale)) in float. A group
  // that holds a NaN or an infinity gets the scale NaN and zeros.
  void (*quantize[kDTypeCount])(const QuantizeRows&);
  // The epilogue of float(sum), sum the exact integer; with groups that of
  //   total = fma(float(sum_g), group_scale_g, total)   in the order of the groups, from 0.
  // Output of the dtype indexed.
  void (*multiply[kDTypeCount])(const QuantizedLinearBlock&);
  // The sums alone, int32, of K up to kMaxSummed; of the epilogue only the output is read.
  void (*accumulate)(const QuantizedLinearBlock&);
};

}  // namespace torchweld::kernels
