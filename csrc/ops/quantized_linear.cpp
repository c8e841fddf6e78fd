#include "ops/quantized_linear.h"

#include "ops/check.h"

namespace torchweld::ops {

LinearShape check_quantized_linear(const char* op, const char* argument, const Tensor& matrix,
                                   bool columns_are_in_features, const Tensor& packed_weight,
                                   const Tensor& weight_scale, int64_t in_features) {
  const auto dtype = to_dtype(matrix.scalar_type());
  TORCHWELD_CHECK(dtype && *dtype != kernels::DType::float64, op, argument,
                  "float32, bfloat16 or float16", dtype_name(matrix.scalar_type()));
  TORCHWELD_CHECK(in_features >= 0 && in_features <= kernels::kMaxInFeatures, op, "in_features",
                  "0 to " << kernels::kMaxInFeatures << ", so that sums of weights fit int32",
                  in_features);
  TORCHWELD_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1 &&
                      weight_scale.is_contiguous(),
                  op, "weight_scale", "contiguous float32 [out_features]",
                  dtype_name(weight_scale.scalar_type()) << " " << shape_string(weight_scale));

  LinearShape shape{.rows = 1,
                    .in_features = in_features,
                    .out_features = weight_scale.size(0),
                    .panels = divide_up(weight_scale.size(0), kernels::kPanelColumns),
                    .quads = divide_up(in_features, kernels::kQuad)};
  TORCHWELD_CHECK(packed_weight.scalar_type() == ScalarType::Char && packed_weight.dim() == 4 &&
                      packed_weight.size(0) == shape.panels &&
                      packed_weight.size(1) == shape.quads &&
                      packed_weight.size(2) == kernels::kPanelColumns &&
                      packed_weight.size(3) == kernels::kQuad && packed_weight.is_contiguous(),
                  op, "packed_weight",
                  "contiguous int8 [" << shape.panels << ", " << shape.quads << ", 16, 4] for "
                                      << shape.out_features << " x " << in_features,
                  dtype_name(packed_weight.scalar_type()) << " " << shape_string(packed_weight));

  const int64_t columns = columns_are_in_features ? in_features : shape.out_features;
  TORCHWELD_CHECK(matrix.dim() >= 1 && matrix.size(matrix.dim() - 1) == columns, op, argument,
                  "[..., " << columns << "]", shape_string(matrix));
  for (int64_t i = 0; i + 1 < matrix.dim(); ++i) shape.rows *= matrix.size(i);
  return shape;
}

void check_weight_sum(const char* op, const Tensor& weight_sum, const LinearShape& shape) {
  TORCHWELD_CHECK(
      weight_sum.scalar_type() == ScalarType::Int && weight_sum.is_contiguous() &&
          weight_sum.dim() == 1 && weight_sum.size(0) == shape.panels * kernels::kPanelColumns,
      op, "weight_sum", "contiguous int32 [" << shape.panels * kernels::kPanelColumns << "]",
      dtype_name(weight_sum.scalar_type()) << " " << shape_string(weight_sum));
}

void check_summed(const char* op, int64_t in_features) {
  TORCHWELD_CHECK(in_features <= kernels::kMaxSummed, op, "in_features",
                  "at most " << kernels::kMaxSummed << ", so that sums fit int32", in_features);
}

void check_group_size(const char* op, int64_t input_group_size) {
  constexpr int64_t kMost = 1 << 16;
  TORCHWELD_CHECK(
      input_group_size >= 0 && input_group_size <= kMost && input_group_size % kernels::kQuad == 0,
      op, "input_group_size", "0 or a multiple of 4 up to " << kMost, input_group_size);
}

}  // namespace torchweld::ops
