// What every back end of the int4 linear ops checks and derives before it touches memory.
#pragma once

#include "kernels/linear_int4.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// Sizes of one product: [rows, in_features] x [in_features, out_features].
struct LinearInt4Shape {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  int64_t panels;  // ceil(out_features / 16)
  int64_t groups;  // ceil(in_features / group_size)
  int64_t group_size;

  int64_t padded_in_features() const { return groups * group_size; }
};

// Each throws unless the operator can run with these. Zeros are not looked at: on CUDA that would
// be to wait for them, and on the CPU who multiplies reads them anyway.
LinearInt4Shape check_quantized_linear_int4(const char* op, const Tensor& input,
                                            const Tensor& packed_weight, const Tensor& weight_scale,
                                            const Tensor& weight_zero, int64_t in_features,
                                            int64_t out_features);
LinearInt4Shape check_quantized_linear_int4_backward(const char* op, const Tensor& grad,
                                                     const Tensor& packed_weight,
                                                     const Tensor& weight_scale,
                                                     const Tensor& weight_zero, int64_t in_features,
                                                     int64_t out_features);

bool fit_4_bits(const uint8_t* values, int64_t count);
// Throws unless all zeros do.
void check_zeros(const char* op, bool fit);

}  // namespace torchweld::ops
