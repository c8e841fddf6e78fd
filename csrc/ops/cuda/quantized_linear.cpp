#include "ops/quantized_linear.h"

#include <algorithm>

#include "kernels/cuda/quantized_linear.h"
#include "ops/cuda/context.h"
#include "ops/cuda/linear.h"
#include "ops/cuda/linear_path.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using kernels::kQuad;
using kernels::QuantizeRows;

struct Product {
  const LinearShape& shape;
  const Tensor& input;
  const Tensor& packed_weight;
  int64_t group_size;
  float* input_scale;  // [rows][groups], or null for scratch
};

// end_at(row): the epilogue from that row on, without the input's scale.
template <class F>
void multiply(const CudaContext& context, const Product& of, const F& end_at) {
  const LinearShape& shape = of.shape;
  const Input input(of.input);
  const Tensor weight = aligned(of.packed_weight);
  const int64_t groups = shape.groups(of.group_size);
  QuantizeRows from{.input = input.at(0),
                    .input_stride = input.rows.stride,
                    .rows = shape.rows,
                    .in_features = shape.in_features,
                    .quantized = nullptr,
                    .quantized_stride = quantized_stride(shape.in_features),
                    .scale = of.input_scale,
                    .group_size = of.group_size};
  QuantizedLinearParams params{.quantized = nullptr,
                               .quantized_stride = from.quantized_stride,
                               .rows = shape.rows,
                               .panels = weight.const_data_ptr<int8_t>(),
                               .quads = shape.quads,
                               .columns = shape.out_features,
                               .group_quads = of.group_size / kQuad,
                               .group_scale = nullptr,
                               .end = end_at(0),
                               .splits = 1,
                               .parts = nullptr};
  const LinearDevice device = linear_device(context);
  const int64_t chunk = rows_at_a_time(shape.rows, from.quantized_stride);
  const LinearPath path = linear_path(chunk, shape.out_features, device);
  if (path == LinearPath::few_rows && of.input_scale == nullptr &&
      quantizes_on_the_way(shape.rows, shape.in_features, of.group_size)) {
    return context.check(launch_quantized_linear_of(input.dtype, from, params,
                                                    device.multiprocessors, context.stream()));
  }
  if (is_one_sum(params.quads, params.group_quads)) {
    params.splits = choose_splits(path, chunk, shape.out_features, shape.in_features, device);
  }
  CudaScratch scratch;
  const auto quantized_at = scratch.reserve<int8_t>(chunk * from.quantized_stride);
  const auto scale_at = scratch.reserve<float>(of.input_scale == nullptr ? chunk * groups : 0);
  const auto parts_at =
      scratch.reserve<int32_t>(params.splits > 1 ? params.splits * chunk * shape.out_features : 0);
  scratch.allocate(of.input);
  params.parts = scratch.at<int32_t>(parts_at);
  from.quantized = scratch.at<int8_t>(quantized_at);
  params.quantized = from.quantized;
  for (int64_t row = 0; row < shape.rows; row += chunk) {
    from.input = input.at(row);
    from.rows = params.rows = std::min(chunk, shape.rows - row);
    from.scale =
        of.input_scale == nullptr ? scratch.at<float>(scale_at) : of.input_scale + row * groups;
    context.check(launch_quantize_rows(input.dtype, from, context.stream()));
    params.end = end_at(row);
    if (of.group_size == 0) params.end.of.input_scale = from.scale;
    params.group_scale = from.scale;
    context.check(launch_quantized_linear(params, path, device.multiprocessors, context.stream()));
  }
}

Tensor quantized_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor weight_sum,
                        std::optional<Tensor> bias, std::optional<Tensor> residual,
                        int64_t in_features, String activation, int64_t input_group_size) {
  const char* op = "quantized_linear";
  const LinearShape shape = check_quantized_linear(op, input, packed_weight, weight_scale,
                                                   weight_sum, in_features, input_group_size);
  check_devices(
      op, packed_weight,
      {{"input", input}, {"weight_scale", weight_scale}, {"bias", bias}, {"residual", residual}});

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  Tensor output = torch::stable::new_empty(input, with_last_size(input, shape.out_features));
  const CudaLinearTail tail(op, output, bias, residual, activation);
  if (output.numel() == 0) return output;
  multiply(context, {shape, input, packed_weight, input_group_size, nullptr}, [&](int64_t row) {
    LinearEnd end = tail.at(row);
    end.of.weight_scale = weight_scale.const_data_ptr<float>();
    return end;
  });
  return output;
}

std::tuple<Tensor, Tensor> quantized_linear_accumulators(Tensor input, Tensor packed_weight,
                                                         Tensor weight_scale, Tensor weight_sum,
                                                         int64_t in_features) {
  const char* op = "quantized_linear_accumulators";
  const LinearShape shape = check_quantized_linear_accumulators(
      op, input, packed_weight, weight_scale, weight_sum, in_features);
  check_devices(op, packed_weight, {{"input", input}});

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  IntList scale_sizes = with_last_size(input, 0);
  scale_sizes.pop_back();
  Tensor sums =
      torch::stable::new_empty(input, with_last_size(input, shape.out_features), ScalarType::Int);
  Tensor input_scale = torch::stable::new_empty(input, scale_sizes, ScalarType::Float);
  if (input_scale.numel() == 0) return {sums, input_scale};
  int32_t* data = sums.mutable_data_ptr<int32_t>();
  multiply(context, {shape, input, packed_weight, 0, input_scale.mutable_data_ptr<float>()},
           [&](int64_t row) {
             LinearEnd end{};
             end.of.output = data + row * shape.out_features;
             end.of.output_stride = shape.out_features;
             end.stores_sums = true;
             return end;
           });
  return {sums, input_scale};
}

Tensor quantized_linear_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale,
                                 int64_t in_features) {
  const char* op = "quantized_linear_backward";
  const LinearShape shape =
      check_quantized_linear_backward(op, grad, packed_weight, weight_scale, in_features);
  check_devices(op, packed_weight, {{"grad", grad}, {"weight_scale", weight_scale}});

  const NoGradGuard no_grad;
  const CudaContext context(op, grad);
  Tensor output = torch::stable::new_empty(grad, with_last_size(grad, in_features));
  if (output.numel() == 0) return output;
  const Input input(grad);
  const Tensor weight = aligned(packed_weight);
  const int64_t row_parts = split_parts(input.dtype) * split_stride(shape.out_features);
  const int64_t chunk = rows_at_a_time(shape.rows, row_parts * 2);
  CudaScratch scratch;
  const auto parts_at = scratch.reserve<kernels::BFloat16>(chunk * row_parts);
  scratch.allocate(grad);
  auto* const parts = scratch.at<kernels::BFloat16>(parts_at);
  char* to = static_cast<char*>(output.mutable_data_ptr());
  for (int64_t row = 0; row < shape.rows; row += chunk) {
    const int64_t count = std::min(chunk, shape.rows - row);
    context.check(launch_split_grad(input.dtype,
                                    {.grad = input.at(row),
                                     .grad_stride = input.rows.stride,
                                     .rows = count,
                                     .columns = shape.out_features,
                                     .weight_scale = weight_scale.const_data_ptr<float>(),
                                     .parts = parts},
                                    context.stream()));
    context.check(
        launch_quantized_linear_backward({.parts = parts,
                                          .rows = count,
                                          .panels = weight.const_data_ptr<int8_t>(),
                                          .quads = shape.quads,
                                          .columns = shape.out_features,
                                          .in_features = in_features,
                                          .output = to + row * in_features * input.element,
                                          .dtype = input.dtype},
                                         context.stream()));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_accumulators", TORCH_BOX(&quantized_linear_accumulators));
  m.impl("quantized_linear_backward", TORCH_BOX(&quantized_linear_backward));
}

}  // namespace torchweld::ops
