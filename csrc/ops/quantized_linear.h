// What every back end of the quantized linear ops checks and derives before it touches memory.
#pragma once

#include "kernels/quantized_linear.h"
#include "ops/divide.h"
#include "ops/linear.h"

namespace torchweld::ops {

// Sizes of one product: [rows, in_features] x [in_features, out_features].
struct LinearShape {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
  int64_t panels;  // ceil(out_features / 16)
  int64_t quads;   // ceil(in_features / 4)

  // Scales of an input row; even one of no elements has one.
  int64_t groups(int64_t group_size) const {
    return group_size && in_features ? divide_up(in_features, group_size) : 1;
  }
};

// Each throws unless the operator can run with these.
LinearShape check_quantized_linear(const char* op, const Tensor& input, const Tensor& packed_weight,
                                   const Tensor& weight_scale, const Tensor& weight_sum,
                                   int64_t in_features, int64_t input_group_size);
LinearShape check_quantized_linear_accumulators(const char* op, const Tensor& input,
                                                const Tensor& packed_weight,
                                                const Tensor& weight_scale,
                                                const Tensor& weight_sum, int64_t in_features);
LinearShape check_quantized_linear_backward(const char* op, const Tensor& grad,
                                            const Tensor& packed_weight, const Tensor& weight_scale,
                                            int64_t in_features);
LinearShape check_weight_only_linear(const char* op, const Tensor& input,
                                     const Tensor& packed_weight, const Tensor& weight_scale,
                                     int64_t in_features);

}  // namespace torchweld::ops
