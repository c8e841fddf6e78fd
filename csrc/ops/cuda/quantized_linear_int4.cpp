#include "ops/quantized_linear_int4.h"

#include "kernels/cuda/linear_int4.h"
#include "kernels/cuda/linear_rows.h"
#include "kernels/cuda/quantized_linear.h"
#include "ops/cuda/context.h"
#include "ops/cuda/linear.h"
#include "ops/cuda/linear_path.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using kernels::BFloat16;

// The packed weight where kernels can read 16 bytes at once.
struct Weight {
  Weight(const Tensor& packed_weight, const Tensor& weight_scale, const Tensor& weight_zero)
      : packed(aligned(packed_weight)), scale(aligned(weight_scale)), zero(aligned(weight_zero)) {}
  Tensor packed, scale, zero;

  const uint8_t* panels() const { return packed.const_data_ptr<uint8_t>(); }
  const BFloat16* scales() const { return static_cast<const BFloat16*>(scale.const_data_ptr()); }
  const uint8_t* zeros() const { return zero.const_data_ptr<uint8_t>(); }
};

// end_at(row): the epilogue from that row on, without the input's scale. `sums` and `input_scale`
// are null but for the integers inside.
template <class F>
void multiply(const CudaContext& context, const LinearInt4Shape& shape, const Tensor& input,
              const Weight& weight, int32_t* sums, float* input_scale, const F& end_at) {
  const Input rows(input);
  LinearInt4Params params{.quantized = nullptr,
                          .quantized_stride = int4_stride(shape.padded_in_features()),
                          .rows = shape.rows,
                          .panels = weight.panels(),
                          .weight_scale = weight.scales(),
                          .weight_zero = weight.zeros(),
                          .groups = shape.groups,
                          .group_size = shape.group_size,
                          .columns = shape.out_features,
                          .end = end_at(0),
                          .sums = sums};
  const int64_t chunk = rows_at_a_time(shape.rows, params.quantized_stride);
  const LinearPath path =
      linear_path(chunk, shape.out_features,
                  {.multiprocessors = context.multiprocessors(), .has_wgmma = false});
  if (path == LinearPath::few_rows && shape.out_features > 0 &&
      int4_quantizes_on_the_way(shape.rows, shape.padded_in_features())) {
    return context.check(launch_linear_int4_of({.data = rows.at(0),
                                                .dtype = rows.dtype,
                                                .stride = rows.rows.stride,
                                                .in_features = shape.in_features,
                                                .scale = input_scale},
                                               params, context.stream()));
  }
  CudaScratch scratch;
  const auto quantized_at = scratch.reserve<int8_t>(chunk * params.quantized_stride);
  const auto scale_at = scratch.reserve<float>(chunk);
  scratch.allocate(input);
  auto* const quantized = scratch.at<int8_t>(quantized_at);
  params.quantized = quantized;
  for (int64_t row = 0; row < shape.rows; row += chunk) {
    params.rows = std::min(chunk, shape.rows - row);
    float* const scale = input_scale ? input_scale + row : scratch.at<float>(scale_at);
    context.check(launch_quantize_rows(rows.dtype,
                                       {.input = rows.at(row),
                                        .input_stride = rows.rows.stride,
                                        .rows = params.rows,
                                        .in_features = shape.in_features,
                                        .quantized = quantized,
                                        .quantized_stride = params.quantized_stride,
                                        .scale = scale,
                                        .group_size = 0},
                                       context.stream()));
    params.end = end_at(row);
    params.end.of.input_scale = scale;
    if (sums) params.sums = sums + row * shape.groups * shape.out_features;
    context.check(launch_linear_int4(params, path, context.stream()));
  }
}

Tensor quantized_linear_int4(Tensor input, Tensor packed_weight, Tensor weight_scale,
                             Tensor weight_zero, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, int64_t in_features,
                             int64_t out_features, String activation) {
  const char* op = "quantized_linear_int4";
  const LinearInt4Shape shape = check_quantized_linear_int4(op, input, packed_weight, weight_scale,
                                                            weight_zero, in_features, out_features);
  check_devices(op, packed_weight,
                {{"input", input},
                 {"weight_scale", weight_scale},
                 {"weight_zero", weight_zero},
                 {"bias", bias},
                 {"residual", residual}});

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Weight weight(packed_weight, weight_scale, weight_zero);
  Tensor output = torch::stable::new_empty(input, with_last_size(input, out_features));
  const CudaLinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  multiply(context, shape, input, weight, nullptr, nullptr,
           [&](int64_t row) { return tail.at(row); });
  return output;
}

std::tuple<Tensor, Tensor> quantized_linear_int4_accumulators(Tensor input, Tensor packed_weight,
                                                              Tensor weight_scale,
                                                              Tensor weight_zero,
                                                              int64_t in_features,
                                                              int64_t out_features) {
  const char* op = "quantized_linear_int4_accumulators";
  const LinearInt4Shape shape = check_quantized_linear_int4(op, input, packed_weight, weight_scale,
                                                            weight_zero, in_features, out_features);
  check_devices(op, packed_weight,
                {{"input", input}, {"weight_scale", weight_scale}, {"weight_zero", weight_zero}});

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Weight weight(packed_weight, weight_scale, weight_zero);
  IntList sizes = with_last_size(input, shape.groups);
  const IntList scale_sizes(sizes.begin(), sizes.end() - 1);
  sizes.push_back(out_features);
  Tensor sums = torch::stable::new_empty(input, sizes, ScalarType::Int);
  Tensor input_scale = torch::stable::new_empty(input, scale_sizes, ScalarType::Float);
  if (input_scale.numel() == 0) return {sums, input_scale};
  multiply(context, shape, input, weight, sums.mutable_data_ptr<int32_t>(),
           input_scale.mutable_data_ptr<float>(), [](int64_t) { return LinearEnd{}; });
  return {sums, input_scale};
}

Tensor quantized_linear_int4_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale,
                                      Tensor weight_zero, int64_t in_features,
                                      int64_t out_features) {
  const char* op = "quantized_linear_int4_backward";
  const LinearInt4Shape shape = check_quantized_linear_int4_backward(
      op, grad, packed_weight, weight_scale, weight_zero, in_features, out_features);
  check_devices(op, packed_weight,
                {{"grad", grad}, {"weight_scale", weight_scale}, {"weight_zero", weight_zero}});

  const NoGradGuard no_grad;
  const CudaContext context(op, grad);
  const Weight weight(packed_weight, weight_scale, weight_zero);
  Tensor output = torch::stable::new_empty(grad, with_last_size(grad, in_features));
  if (output.numel() == 0) return output;
  const Input input(grad);
  const int parts = int4_gradient_parts(input.dtype);
  const int64_t stride = (out_features + 7) / 8 * 8;
  const int64_t chunk = rows_at_a_time(shape.rows, 2 * parts * stride);
  CudaScratch scratch;
  const auto grad_at = scratch.reserve<BFloat16>(chunk * parts * stride);
  scratch.allocate(grad);
  auto* const laid_out = scratch.at<BFloat16>(grad_at);
  char* const to = static_cast<char*>(output.mutable_data_ptr());
  for (int64_t row = 0; row < shape.rows; row += chunk) {
    const int64_t count = std::min(chunk, shape.rows - row);
    context.check(launch_lay_out_rows({.input = input.at(row),
                                       .dtype = input.dtype,
                                       .stride = input.rows.stride,
                                       .rows = count,
                                       .columns = out_features,
                                       .output = laid_out,
                                       .output_stride = stride,
                                       .parts = parts},
                                      context.stream()));
    context.check(launch_linear_int4_backward({.grad = laid_out,
                                               .grad_stride = stride,
                                               .rows = count,
                                               .panels = weight.panels(),
                                               .weight_scale = weight.scales(),
                                               .weight_zero = weight.zeros(),
                                               .groups = shape.groups,
                                               .group_size = shape.group_size,
                                               .columns = out_features,
                                               .in_features = in_features,
                                               .output = to + row * in_features * input.element,
                                               .dtype = input.dtype},
                                              context.stream()));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("quantized_linear_int4", TORCH_BOX(&quantized_linear_int4));
  m.impl("quantized_linear_int4_accumulators", TORCH_BOX(&quantized_linear_int4_accumulators));
  m.impl("quantized_linear_int4_backward", TORCH_BOX(&quantized_linear_int4_backward));
}

}  // namespace torchweld::ops
