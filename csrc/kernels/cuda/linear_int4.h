// The int4 linear layer on CUDA: the packed weight of the CPU (kernels/linear_int4.h), read as
// linear_units.h says, and the CPU's bits: sums of groups are exact, and join in the order of the
// groups, however many warps share them.
#pragma once

#include "kernels/cuda/linear_end.h"
#include "kernels/cuda/linear_path.h"
#include "kernels/linear_int4.h"

namespace torchweld::kernels::cuda {

struct LinearInt4Params {
  const int8_t* quantized;   // [rows][quantized_stride], aligned to 16; zeros behind K
  int64_t quantized_stride;  // groups * group_size or more, a multiple of 16
  int64_t rows;
  const uint8_t* panels;         // aligned to 16
  const BFloat16* weight_scale;  // this and the zeros as well
  const uint8_t* weight_zero;
  int64_t groups;
  int64_t group_size;
  int64_t columns;
  LinearEnd end;
  int32_t* sums;  // [rows][groups][columns]; if not null they are all that is computed
};

// Bytes from one quantized row to the next, as above.
constexpr int64_t int4_stride(int64_t padded_in_features) {
  return (padded_in_features + 63) / 64 * 64;
}

// Groups that are no multiple of 32, and the sums, are for the path of few rows whatever is asked
// for: there a step may end within a group. It reads the weight once for every 16 rows.
cudaError_t launch_linear_int4(const LinearInt4Params&, LinearPath, cudaStream_t);

// The same for rows not yet quantized, which every block does for itself: one launch, and the
// weight is on its way meanwhile. `params` has no quantized rows and no input_scale;
// `scale` [rows] is written if it is not null.
bool int4_quantizes_on_the_way(int64_t rows, int64_t padded_in_features);
struct Int4Input {
  const void* data;
  DType dtype;
  int64_t stride;
  int64_t in_features;
  float* scale;
};
cudaError_t launch_linear_int4_of(const Int4Input&, const LinearInt4Params&, cudaStream_t);

// What is behind it.
cudaError_t launch_int4_few_rows(const LinearInt4Params&, cudaStream_t);
cudaError_t launch_int4_tiles(const LinearInt4Params&, bool large, cudaStream_t);

// The gradient for the input, grad @ weight: products are exact, sums are float32, in an order
// that only the number of columns decides.
struct LinearInt4Gradient {
  const BFloat16*
      grad;  // in parts, see linear_rows.h: [int4_gradient_parts(dtype)][rows][grad_stride]
  int64_t grad_stride;  // columns or more, a multiple of 8; zeros behind the last column
  int64_t rows;
  const uint8_t* panels;  // aligned to 16
  const BFloat16* weight_scale;
  const uint8_t* weight_zero;
  int64_t groups;
  int64_t group_size;
  int64_t columns;  // of the layer
  int64_t in_features;
  void* output;  // [rows][in_features]
  DType dtype;   // the gradient's and the output's
};
constexpr int int4_gradient_parts(DType dtype) {
  return dtype == DType::float32 ? 3 : dtype == DType::float16 ? 2 : 1;
}
cudaError_t launch_linear_int4_backward(const LinearInt4Gradient&, cudaStream_t);

}  // namespace torchweld::kernels::cuda
