#include "ops/quantized_linear.h"

#include "ops/check.h"

namespace torchweld::ops {
namespace {

// Sizes, all but the rows. Throws unless the packed weight and its scales fit each other.
LinearShape check_weight(const char* op, const Tensor& packed_weight, const Tensor& weight_scale,
                         int64_t in_features) {
  TORCHWELD_CHECK(in_features >= 0 && in_features <= kernels::kMaxInFeatures, op, "in_features",
                  "0 to " << kernels::kMaxInFeatures << ", so that sums of weights fit int32",
                  in_features);
  TORCHWELD_CHECK(weight_scale.scalar_type() == ScalarType::Float && weight_scale.dim() == 1 &&
                      weight_scale.is_contiguous(),
                  op, "weight_scale", "contiguous float32 [out_features]", describe(weight_scale));
  const LinearShape shape{.rows = 0,
                          .in_features = in_features,
                          .out_features = weight_scale.size(0),
                          .panels = divide_up(weight_scale.size(0), kernels::kPanelColumns),
                          .quads = divide_up(in_features, kernels::kQuad)};
  TORCHWELD_CHECK(packed_weight.scalar_type() == ScalarType::Char &&
                      has_shape(packed_weight, {shape.panels, shape.quads, kernels::kPanelColumns,
                                                kernels::kQuad}) &&
                      packed_weight.is_contiguous(),
                  op, "packed_weight",
                  "contiguous int8 [" << shape.panels << ", " << shape.quads << ", 16, 4] for "
                                      << shape.out_features << " x " << in_features,
                  describe(packed_weight));
  return shape;
}

void check_weight_sum(const char* op, const Tensor& weight_sum, const LinearShape& shape) {
  const int64_t columns = shape.panels * kernels::kPanelColumns;
  TORCHWELD_CHECK(weight_sum.scalar_type() == ScalarType::Int && weight_sum.is_contiguous() &&
                      has_shape(weight_sum, {columns}),
                  op, "weight_sum", "contiguous int32 [" << columns << "]", describe(weight_sum));
}

}  // namespace

LinearShape check_weight_only_linear(const char* op, const Tensor& input,
                                     const Tensor& packed_weight, const Tensor& weight_scale,
                                     int64_t in_features) {
  LinearShape shape = check_weight(op, packed_weight, weight_scale, in_features);
  shape.rows = check_matrix(op, "input", input, in_features);
  return shape;
}

LinearShape check_quantized_linear_backward(const char* op, const Tensor& grad,
                                            const Tensor& packed_weight, const Tensor& weight_scale,
                                            int64_t in_features) {
  LinearShape shape = check_weight(op, packed_weight, weight_scale, in_features);
  shape.rows = check_matrix(op, "grad", grad, shape.out_features);
  return shape;
}

LinearShape check_quantized_linear(const char* op, const Tensor& input, const Tensor& packed_weight,
                                   const Tensor& weight_scale, const Tensor& weight_sum,
                                   int64_t in_features, int64_t input_group_size) {
  const LinearShape shape =
      check_weight_only_linear(op, input, packed_weight, weight_scale, in_features);
  check_weight_sum(op, weight_sum, shape);
  constexpr int64_t kMost = 1 << 16;  // sums of a group fit int32
  TORCHWELD_CHECK(
      input_group_size >= 0 && input_group_size <= kMost && input_group_size % kernels::kQuad == 0,
      op, "input_group_size", "0 or a multiple of 4 up to " << kMost, input_group_size);
  return shape;
}

LinearShape check_quantized_linear_accumulators(const char* op, const Tensor& input,
                                                const Tensor& packed_weight,
                                                const Tensor& weight_scale,
                                                const Tensor& weight_sum, int64_t in_features) {
  const LinearShape shape =
      check_quantized_linear(op, input, packed_weight, weight_scale, weight_sum, in_features, 0);
  TORCHWELD_CHECK(in_features <= kernels::kMaxSummed, op, "in_features",
                  "at most " << kernels::kMaxSummed << ", so that sums fit int32", in_features);
  return shape;
}

}  // namespace torchweld::ops
