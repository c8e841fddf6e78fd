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

// Largest K for which sums of K products within 127 * 127 fit int32.
inline constexpr int64_t kMaxInFeatures = INT32_MAX / (127 * 127);

// Rows to quantize. A quantized row is opaque: only the kernels of the same instruction set read
// it. Whole registers are written, so its stride is K rounded up to kQuantizedRowAlign at least.
struct QuantizeRows {
  const void* input;  // rows of in_features consecutive elements
  int64_t input_stride;
  int64_t rows;
  int64_t in_features;
  int8_t* quantized;
  int64_t quantized_stride;
  float* scale;  // [rows]
};
inline constexpr int64_t kQuantizedRowAlign = 64;

// A block of the product: all given rows times the panels that hold columns [0, columns).
struct QuantizedLinearBlock {
  const int8_t* quantized;
  int64_t quantized_stride;
  int64_t rows;
  const int8_t* panels;
  const int32_t* weight_sum;  // sum over k of each column, padded to whole panels
  int64_t quads;              // ceil(K / 4)
  int64_t columns;
  LinearEpilogue epilogue;
};

// A run of panels to turn back into float rows.
struct DequantizePanels {
  const int8_t* panels;
  int64_t quads;
  int64_t columns;
  int64_t in_features;
  const float* weight_scale;  // [columns]
  void* output;               // [columns, in_features], contiguous
};

// All are safe to call at once on disjoint outputs, and no result depends on how rows and panels
// are divided into calls.
struct QuantizedLinearKernels {
  // scale = max(absmax / 127, FLT_MIN) and q = round_half_even(x * (1 / scale)) in float. A row
  // that holds a NaN or an infinity gets the scale NaN and zeros.
  void (*quantize[kDTypeCount])(const QuantizeRows&);
  // The epilogue of the exact int32 sums; output of the dtype indexed.
  void (*multiply[kDTypeCount])(const QuantizedLinearBlock&);
  // The sums alone, int32; of the epilogue only the output is read.
  void (*accumulate)(const QuantizedLinearBlock&);
  // float(q) * weight_scale, rounded once.
  void (*dequantize[kDTypeCount])(const DequantizePanels&);
};

}  // namespace torchweld::kernels
