// The int8 linear layer on CUDA. A packed weight is what the CPU reads
// (kernels/quantized_linear.h), and lies as the tensor cores want their left operand: the 16 bytes
// at (panel, quad, row r of 4) are four k of four neighbouring columns. In what follows a step is
// 16 quads, 64 k; of one, a lane with g = lane / 4 and t = lane % 4 holds quads 4 t to 4 t + 3 of
// columns 4 g to 4 g + 3 of two panels. Which k and which column a place of mma_s8's operands
// stands for is free as long as both sides and the result agree, so nothing is ever rearranged.
#pragma once

#include "kernels/cuda/linear_epilogue.h"
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
};

cudaError_t launch_quantized_linear(const QuantizedLinearParams&, int multiprocessors,
                                    cudaStream_t);

// The same for rows that are quantized on the way, once in every block: fewer launches, where so
// few rows are multiplied that a block reads much more of the weight. One scale for a row.
// `params` has no quantized rows and no input_scale.
bool quantizes_on_the_way(int64_t rows, int64_t in_features, int64_t group_size);
cudaError_t launch_quantized_linear_of(DType, const QuantizeRows&, const QuantizedLinearParams&,
                                       cudaStream_t);

// Rows up to which launch_quantized_linear() sums without tiles.
inline constexpr int64_t kFewRows = 32;
// Launches of the two kernels behind it.
cudaError_t launch_few_rows(const QuantizedLinearParams&, cudaStream_t);
cudaError_t launch_tiles(const QuantizedLinearParams&, int multiprocessors, cudaStream_t);

}  // namespace torchweld::kernels::cuda
