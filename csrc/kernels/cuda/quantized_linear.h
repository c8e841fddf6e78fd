// The int8 linear layer on CUDA. A packed weight is what the CPU reads
// (kernels/quantized_linear.h), and lies as the tensor cores want their left operand: the 16 bytes
// at (panel, quad, row r of 4) are four k of four neighbouring columns. In what follows a step is
// 16 quads, 64 k; of one, a lane with g = lane / 4 and t = lane % 4 holds quads 4 t to 4 t + 3 of
// columns 4 g to 4 g + 3 of two panels. Which k and which column a place of mma_s8's operands
// stands for is free as long as both sides and the result agree, so nothing is ever rearranged.
#pragma once

#include "kernels/cuda/linear_end.h"
#include "kernels/cuda/linear_path.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels::cuda {

inline constexpr int64_t kStepQuads = 16;
inline constexpr int64_t kStep = kStepQuads * kQuad;

// Bytes from one quantized row to the next: whole steps, of which the last ends in zeros.
constexpr int64_t quantized_stride(int64_t in_features) {
  return (in_features + kStep - 1) / kStep * kStep;
}

// Quantizes as the CPU does, bit for bit, and fills rows up to their stride with zeros. The stride
// is a multiple of 4.
cudaError_t launch_quantize_rows(DType, const QuantizeRows&, cudaStream_t);

struct QuantizedLinearParams {
  const int8_t* quantized;   // [rows][quantized_stride], aligned to 16
  int64_t quantized_stride;  // that of in_features
  int64_t rows;
  const int8_t* panels;  // aligned to 16
  int64_t quads;         // ceil(K / 4)
  int64_t columns;
  int64_t group_quads;       // 0: a row has one scale, the epilogue's
  const float* group_scale;  // [rows][groups] otherwise, and the epilogue has none
  LinearEnd end;
  // If more than one, each of so many blocks sums a part of K to `parts`, [splits][rows][columns],
  // and a second kernel finishes. Only for what is one sum.
  int64_t splits;
  int32_t* parts;
};

// Whether all of K is one sum, and not groups or more than int32 holds: what all paths can make.
// For the others there are small tiles, and few rows if groups are whole steps.
constexpr bool is_one_sum(int64_t quads, int64_t group_quads) {
  return group_quads == 0 && quads * kQuad <= kMaxSummed;
}

cudaError_t launch_quantized_linear(const QuantizedLinearParams&, LinearPath, int multiprocessors,
                                    cudaStream_t);

// The same for rows that are quantized on the way, once in every block: fewer launches, where so
// few rows are multiplied that a block reads much more of the weight. One scale for a row.
// `params` has no quantized rows and no input_scale.
bool quantizes_on_the_way(int64_t rows, int64_t in_features, int64_t group_size);
cudaError_t launch_quantized_linear_of(DType, const QuantizeRows&, const QuantizedLinearParams&,
                                       int multiprocessors, cudaStream_t);

// The launches behind it: of one sum; of groups; of tiles; of sums that int32 holds for `quads`
// only; of one sum, on compute capability 9.0 of a build with sm_90a; of the parts of a sum.
cudaError_t launch_few_rows(const QuantizedLinearParams&, int multiprocessors, cudaStream_t);
cudaError_t launch_few_groups(const QuantizedLinearParams&, cudaStream_t);
cudaError_t launch_tiles(const QuantizedLinearParams&, bool large, cudaStream_t);
cudaError_t launch_long_sums(const QuantizedLinearParams&, int64_t quads, cudaStream_t);
cudaError_t launch_warpgroups(const QuantizedLinearParams&, bool wide, cudaStream_t);
cudaError_t launch_join_parts(const QuantizedLinearParams&, cudaStream_t);

// The gradient for the input, grad @ (weight_scale * weight). Scaled gradients are cut into parts
// of 8 bits, bfloat16 numbers that together are the float (two of three are enough for a 16-bit
// gradient), which tensor cores multiply with the integers of the weight exactly; sums are float32.
struct SplitGradParams {
  const void* grad;  // [rows][grad_stride]
  int64_t grad_stride;
  int64_t rows;
  int64_t columns;            // of the layer
  const float* weight_scale;  // [columns]
  BFloat16* parts;            // [rows][part][split_stride(columns)], aligned to 16
};
struct QuantizedLinearBackwardParams {
  const BFloat16* parts;
  int64_t rows;
  const int8_t* panels;  // aligned to 16
  int64_t quads;
  int64_t columns;
  int64_t in_features;
  void* output;  // [rows][in_features], of the gradient's dtype
  DType dtype;
};

// Elements from one part to the next: whole panels, of which the last ends in zeros.
constexpr int64_t split_stride(int64_t columns) {
  return (columns + kPanelColumns - 1) / kPanelColumns * kPanelColumns;
}
constexpr int split_parts(DType dtype) { return dtype == DType::float32 ? 3 : 2; }

cudaError_t launch_split_grad(DType, const SplitGradParams&, cudaStream_t);
cudaError_t launch_quantized_linear_backward(const QuantizedLinearBackwardParams&, cudaStream_t);

}  // namespace torchweld::kernels::cuda
