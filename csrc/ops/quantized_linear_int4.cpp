#include "ops/quantized_linear_int4.h"

#include <algorithm>

#include "ops/check.h"
#include "ops/divide.h"
#include "ops/linear.h"

namespace torchweld::ops {
namespace {

using kernels::kOctet;
using kernels::kPanelColumns;

// Sizes, all but the rows. Throws unless the packed weight, its scales and zeros fit each other and
// the sizes.
LinearInt4Shape check_weight(const char* op, const Tensor& packed_weight,
                             const Tensor& weight_scale, const Tensor& weight_zero,
                             int64_t in_features, int64_t out_features) {
  TORCHWELD_CHECK(in_features >= 0, op, "in_features", "0 or more", in_features);
  TORCHWELD_CHECK(out_features >= 0, op, "out_features", "0 or more", out_features);

  LinearInt4Shape shape{.rows = 0,
                        .in_features = in_features,
                        .out_features = out_features,
                        .panels = divide_up(out_features, kPanelColumns),
                        .groups = 0,
                        .group_size = 0};
  TORCHWELD_CHECK(weight_scale.scalar_type() == ScalarType::BFloat16 && weight_scale.dim() == 3 &&
                      weight_scale.size(0) == shape.panels &&
                      weight_scale.size(2) == kPanelColumns && weight_scale.is_contiguous(),
                  op, "weight_scale",
                  "contiguous bfloat16 [" << shape.panels << ", groups, 16] for " << out_features
                                          << " output features",
                  describe(weight_scale));
  shape.groups = weight_scale.size(1);
  TORCHWELD_CHECK(weight_zero.scalar_type() == ScalarType::Byte &&
                      has_shape(weight_zero, {shape.panels, shape.groups, kPanelColumns}) &&
                      weight_zero.is_contiguous(),
                  op, "weight_zero",
                  "contiguous uint8 [" << shape.panels << ", " << shape.groups << ", 16]",
                  describe(weight_zero));

  const bool is_packed = packed_weight.scalar_type() == ScalarType::Byte &&
                         packed_weight.dim() == 4 && packed_weight.is_contiguous() &&
                         has_shape(packed_weight, {shape.panels, packed_weight.size(1),
                                                   kPanelColumns, kernels::kQuad});
  const int64_t octets = is_packed ? packed_weight.size(1) : 0;
  if (shape.groups > 0) shape.group_size = octets / shape.groups * kOctet;
  // Padding to whole groups, and no group of padding alone or of nothing.
  const int64_t padding = shape.padded_in_features() - in_features;
  const bool fits = octets * kOctet == shape.padded_in_features() && octets >= shape.groups &&
                    padding >= 0 && padding <= std::max<int64_t>(shape.group_size - 1, 0);
  TORCHWELD_CHECK(is_packed && fits, op, "packed_weight",
                  "contiguous uint8 [" << shape.panels << ", " << shape.groups
                                       << " * group_size / 8, 16, 4] for " << out_features << " x "
                                       << in_features << " in " << shape.groups << " groups",
                  describe(packed_weight));
  TORCHWELD_CHECK(
      shape.group_size <= kernels::kMaxInt4Group, op, "packed_weight",
      "groups of at most " << kernels::kMaxInt4Group << ", so that int32 sums cannot overflow",
      shape.group_size);
  return shape;
}

}  // namespace

LinearInt4Shape check_quantized_linear_int4(const char* op, const Tensor& input,
                                            const Tensor& packed_weight, const Tensor& weight_scale,
                                            const Tensor& weight_zero, int64_t in_features,
                                            int64_t out_features) {
  LinearInt4Shape shape =
      check_weight(op, packed_weight, weight_scale, weight_zero, in_features, out_features);
  shape.rows = check_matrix(op, "input", input, in_features);
  return shape;
}

LinearInt4Shape check_quantized_linear_int4_backward(const char* op, const Tensor& grad,
                                                     const Tensor& packed_weight,
                                                     const Tensor& weight_scale,
                                                     const Tensor& weight_zero, int64_t in_features,
                                                     int64_t out_features) {
  LinearInt4Shape shape =
      check_weight(op, packed_weight, weight_scale, weight_zero, in_features, out_features);
  shape.rows = check_matrix(op, "grad", grad, out_features);
  return shape;
}

bool fit_4_bits(const uint8_t* values, int64_t count) {
  uint8_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= values[i];
  return bits <= 15;
}

void check_zeros(const char* op, bool fit) {
  TORCHWELD_CHECK(fit, op, "weight_zero", "values within 0 to 15", "greater ones");
}

}  // namespace torchweld::ops
