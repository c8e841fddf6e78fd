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

// Throws unless the packed weight and its scales fit each other, and `matrix`, the argument of that
// name, is float32, bfloat16 or float16 [..., columns] with the number of columns given.
LinearShape check_quantized_linear(const char* op, const char* argument, const Tensor& matrix,
                                   bool columns_are_in_features, const Tensor& packed_weight,
                                   const Tensor& weight_scale, int64_t in_features);

void check_weight_sum(const char* op, const Tensor& weight_sum, const LinearShape& shape);

// Throws unless all sums of so many products fit int32.
void check_summed(const char* op, int64_t in_features);

// Throws unless it is 0 or a multiple of 4 whose sums fit int32.
void check_group_size(const char* op, int64_t input_group_size);

}  // namespace torchweld::ops
