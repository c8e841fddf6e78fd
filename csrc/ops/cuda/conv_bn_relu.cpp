#include "ops/conv_bn_relu.h"

#include "ops/check.h"
#include "ops/cuda/batch_norm.h"
#include "ops/cuda/convolution.h"

namespace torchweld::ops {
namespace {

using namespace batch_norm;

// --- training and frozen forward -----------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu(
    Tensor input, Tensor weight, OptionalTensor bias, OptionalTensor bn_weight,
    OptionalTensor bn_bias, OptionalTensor residual, IntList stride, IntList padding,
    IntList dilation, int64_t groups, double eps, String activation, double negative_slope) {
  const char* op = "conv_bn_relu";
  const Convolution conv{stride, padding, dilation, groups};
  const IntList shape =
      check_conv_bn_relu(op, input, weight, bias, {bn_weight, bn_bias, residual, activation}, conv);
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Tensor x = convolve(context, input, weight, bias, conv);
  const Tensor mean = doubles(x, shape[1]), invstd = doubles(x, shape[1]),
               var = doubles(x, shape[1]);
  const Scratch scratch(x);
  const Tensor output = empty_as(x);
  const StatisticsParams statistics{.shape = batch_norm_shape(x),
                                    .x = x.const_data_ptr(),
                                    .scratch = scratch.data,
                                    .eps = eps,
                                    .count = nullptr,
                                    .mean = data_of(mean),
                                    .m2 = nullptr,
                                    .var = data_of(var),
                                    .invstd = data_of(invstd)};
  normalize(context, x, norm.statistics(mean, invstd).affine(bn_weight, bn_bias), residual, output,
            &statistics);
  return {output, x, mean, invstd, var};
}

std::tuple<Tensor, Tensor> conv_bn_relu_frozen(Tensor input, Tensor weight, OptionalTensor bias,
                                               OptionalTensor bn_weight, OptionalTensor bn_bias,
                                               Tensor running_mean, Tensor running_var,
                                               OptionalTensor residual, IntList stride,
                                               IntList padding, IntList dilation, int64_t groups,
                                               double eps, String activation,
                                               double negative_slope) {
  const char* op = "conv_bn_relu_frozen";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu(op, input, weight, bias, {bn_weight, bn_bias, residual, activation}, conv);
  check_running(op, running_mean, running_var, weight.size(0), input);
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  norm.running(running_mean, running_var, eps).affine(bn_weight, bn_bias);
  const Tensor x = convolve(context, input, weight, bias, conv);
  const Tensor output = empty_as(x);
  normalize(context, x, norm, residual, output);
  return {output, x};
}

Tensor conv_relu(Tensor input, Tensor weight, OptionalTensor, OptionalTensor bias,
                 OptionalTensor residual, IntList stride, IntList padding, IntList dilation,
                 int64_t groups, String activation, double negative_slope) {
  const char* op = "conv_relu";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu(op, input, weight, bias, {std::nullopt, std::nullopt, residual, activation},
                     conv);
  TORCHWELD_CHECK(input.is_cuda(), op, "input", "a tensor on CUDA, as packed_weight is",
                  "one on another device");
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const OptionalTensor at_once = convolve_at_once(context, input, weight, bias, residual, conv,
                                                  norm.input().activation, negative_slope);
  if (at_once) return *at_once;
  norm.affine(std::nullopt, bias);
  const Tensor output = convolve(context, input, weight, std::nullopt, conv);
  normalize(context, output, norm, residual, output);
  return output;
}

// The convolution is ATen's: nothing is packed.
Tensor conv_relu_pack(Tensor weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups) {
  check_weight("conv_relu_pack", weight, {stride, padding, dilation, groups});
  return torch::stable::new_empty(weight, IntList{1, 1, 1, 0}, ScalarType::Float);
}

// --- backward ------------------------------------------------------------------------------------
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients for input, weight, bias, bn_weight, bn_bias and residual, as output_mask asks; an empty
// tensor for each of the others.
Gradients backward(const CudaContext& context, const Tensor& grad_output, const Tensor& input,
                   const Tensor& weight, const OptionalTensor& bn_weight,
                   const OptionalTensor& bn_bias, const OptionalTensor& residual,
                   const Tensor& conv_output, const Norm& norm, const Convolution& conv,
                   const std::vector<bool>& output_mask, bool frozen) {
  const Tensor x = dense(conv_output), grad_y = laid_out_as(x, grad_output);
  OptionalTensor dense_residual;
  if (residual) dense_residual = laid_out_as(x, *residual);
  const bool conv_grad = output_mask[0] || output_mask[1];

  OptionalTensor of_bias, of_bn_weight, of_bn_bias, grad_x, of_residual;
  const IntList channels{x.size(1)};
  if (output_mask[2]) {
    // Batch statistics take a constant back out of every channel: the exact gradient is 0.
    of_bias = frozen ? torch::stable::new_empty(input, channels)
                     : torch::stable::new_zeros(input, channels);
  }
  if (output_mask[3]) of_bn_weight = torch::stable::new_empty(bn_weight.value_or(input), channels);
  if (output_mask[4]) of_bn_bias = torch::stable::new_empty(bn_bias.value_or(input), channels);
  std::optional<Reduction> sums;
  if (output_mask[3] || output_mask[4] || (frozen ? output_mask[2] : conv_grad)) {
    sums.emplace(x, norm, dense_residual, grad_y, of_bn_weight, of_bn_bias,
                 frozen ? of_bias : std::nullopt);
  }

  if (conv_grad) grad_x = empty_as(x);
  if (output_mask[5]) of_residual = empty_as(x);
  const bool writes = grad_x || of_residual;
  const bool at_once = sums && writes && batch_norm_is_small(batch_norm_shape(x));
  if (sums && !at_once) {
    context.check(launch_batch_norm_relu_reduce(sums->params, context.stream()));
  }
  if (writes) {
    const bool constant = frozen || !conv_grad;
    const ApplyParams params{
        .shape = batch_norm_shape(x),
        .bn = norm.input(),
        .x = x.const_data_ptr(),
        .residual = data_or_null(dense_residual),
        .grad_y = grad_y.const_data_ptr(),
        .sum_g = constant ? nullptr : const_data_of(sums->sum_g),
        .sum_g_xhat = constant ? nullptr : const_data_of(sums->sum_g_xhat),
        .count = nullptr,
        .grad_x = grad_x ? grad_x->mutable_data_ptr() : nullptr,
        .grad_residual = of_residual ? of_residual->mutable_data_ptr() : nullptr};
    context.check(at_once ? launch_batch_norm_relu_backward(sums->params, params, context.stream())
                          : launch_batch_norm_relu_apply(params, context.stream()));
  }
  std::tuple<Tensor, Tensor> of_conv;
  if (conv_grad) {
    of_conv =
        convolve_backward(context, *grad_x, input, weight, conv, output_mask[0], output_mask[1]);
  }
  const auto or_nothing = [&](const OptionalTensor& gradient) {
    return gradient ? *gradient : nothing(input);
  };
  return {output_mask[0] ? std::get<0>(of_conv) : nothing(input),
          output_mask[1] ? std::get<1>(of_conv) : nothing(input),
          or_nothing(of_bias),
          or_nothing(of_bn_weight),
          or_nothing(of_bn_bias),
          or_nothing(of_residual)};
}

Gradients conv_bn_relu_backward(Tensor grad_output, Tensor input, Tensor weight,
                                OptionalTensor bn_weight, OptionalTensor bn_bias,
                                OptionalTensor residual, Tensor conv_output, Tensor mean,
                                Tensor invstd, IntList stride, IntList padding, IntList dilation,
                                int64_t groups, String activation, double negative_slope,
                                std::vector<bool> output_mask) {
  const char* op = "conv_bn_relu_backward";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu_backward(op, grad_output, input, weight,
                              {bn_weight, bn_bias, residual, activation}, conv_output, conv,
                              output_mask);
  check_statistics(op, mean, invstd, weight.size(0), input);
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  norm.statistics(mean, invstd).affine(bn_weight, bn_bias);
  return backward(context, grad_output, input, weight, bn_weight, bn_bias, residual, conv_output,
                  norm, conv, output_mask, false);
}

Gradients conv_bn_relu_frozen_backward(Tensor grad_output, Tensor input, Tensor weight,
                                       OptionalTensor bn_weight, OptionalTensor bn_bias,
                                       Tensor running_mean, Tensor running_var,
                                       OptionalTensor residual, Tensor conv_output, IntList stride,
                                       IntList padding, IntList dilation, int64_t groups,
                                       double eps, String activation, double negative_slope,
                                       std::vector<bool> output_mask) {
  const char* op = "conv_bn_relu_frozen_backward";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu_backward(op, grad_output, input, weight,
                              {bn_weight, bn_bias, residual, activation}, conv_output, conv,
                              output_mask);
  check_running(op, running_mean, running_var, weight.size(0), input);
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  norm.running(running_mean, running_var, eps).affine(bn_weight, bn_bias);
  return backward(context, grad_output, input, weight, bn_weight, bn_bias, residual, conv_output,
                  norm, conv, output_mask, true);
}

// --- statistics ----------------------------------------------------------------------------------
void update_running_stats(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var,
                          int64_t count, double momentum) {
  check_running_stats(running_mean, running_var, mean, var, count);
  if (count == 0) return;  // an empty batch says nothing
  const CudaContext context("update_running_stats", mean);
  const double values = static_cast<double>(count);
  context.check(launch_update_running_stats(
      {.channels = mean.size(0),
       .running_mean = {running_mean.mutable_data_ptr(), dtype_of(running_mean)},
       .running_var = {running_var.mutable_data_ptr(), dtype_of(running_var)},
       .mean = const_data_of(mean),
       .var = const_data_of(var),
       .correction = values / (values - 1),
       .momentum = momentum},
      context.stream()));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor input) {
  const char* op = "batch_norm_stats";
  check_activations(op, "input", input);
  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Tensor x = dense(input);
  const Tensor count = doubles(x, 1), mean = doubles(x, x.size(1)), m2 = doubles(x, x.size(1));
  const Scratch scratch(x);
  context.check(launch_batch_norm_statistics({.shape = batch_norm_shape(x),
                                              .x = x.const_data_ptr(),
                                              .scratch = scratch.data,
                                              .eps = 0,
                                              .count = data_of(count),
                                              .mean = data_of(mean),
                                              .m2 = data_of(m2),
                                              .var = nullptr,
                                              .invstd = nullptr},
                                             context.stream()));
  return {count, mean, m2};
}

// --- normalize apart from the convolution --------------------------------------------------------
Tensor batch_norm_relu(Tensor input, Tensor mean, Tensor invstd, OptionalTensor bn_weight,
                       OptionalTensor bn_bias, OptionalTensor residual, String activation,
                       double negative_slope) {
  const char* op = "batch_norm_relu";
  check_batch_norm_relu(op, input, mean, invstd, {bn_weight, bn_bias, residual, activation});
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Tensor x = dense(input);
  const Tensor output = empty_as(x);
  normalize(context, x, norm.statistics(mean, invstd).affine(bn_weight, bn_bias), residual, output);
  return output;
}

std::tuple<Tensor, Tensor> batch_norm_relu_backward_reduce(
    Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, OptionalTensor bn_weight,
    OptionalTensor bn_bias, OptionalTensor residual, String activation, double negative_slope) {
  const char* op = "batch_norm_relu_backward_reduce";
  check_batch_norm_relu_backward(op, grad_output, input, mean, invstd,
                                 {bn_weight, bn_bias, residual, activation});
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  const Tensor x = dense(input);
  const Tensor grad_y = laid_out_as(x, grad_output);
  if (residual) residual = laid_out_as(x, *residual);
  const Reduction sums(x, norm.statistics(mean, invstd).affine(bn_weight, bn_bias), residual,
                       grad_y);
  context.check(launch_batch_norm_relu_reduce(sums.params, context.stream()));
  return {sums.sum_g, sums.sum_g_xhat};
}

std::tuple<Tensor, Tensor> batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean,
                                                    Tensor invstd, OptionalTensor bn_weight,
                                                    OptionalTensor bn_bias, OptionalTensor residual,
                                                    Tensor sum_g, Tensor sum_g_xhat, Tensor count,
                                                    String activation, double negative_slope) {
  const char* op = "batch_norm_relu_backward";
  check_batch_norm_relu_backward(op, grad_output, input, mean, invstd,
                                 {bn_weight, bn_bias, residual, activation});
  check_sums(op, sum_g, sum_g_xhat, count, input);
  Norm norm(op, activation, negative_slope);

  const NoGradGuard no_grad;
  const CudaContext context(op, input);
  norm.statistics(mean, invstd).affine(bn_weight, bn_bias);
  const Tensor x = dense(input), grad_y = laid_out_as(x, grad_output);
  if (residual) residual = laid_out_as(x, *residual);
  const Tensor grad_x = empty_as(x), grad_residual = residual ? empty_as(x) : nothing(x);
  context.check(launch_batch_norm_relu_apply(
      {.shape = batch_norm_shape(x),
       .bn = norm.input(),
       .x = x.const_data_ptr(),
       .residual = data_or_null(residual),
       .grad_y = grad_y.const_data_ptr(),
       .sum_g = const_data_of(sum_g),
       .sum_g_xhat = const_data_of(sum_g_xhat),
       .count = const_data_of(count),
       .grad_x = grad_x.mutable_data_ptr(),
       .grad_residual = residual ? grad_residual.mutable_data_ptr() : nullptr},
      context.stream()));
  return {grad_x, grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu));
  m.impl("conv_bn_relu_backward", TORCH_BOX(&conv_bn_relu_backward));
  m.impl("conv_bn_relu_frozen", TORCH_BOX(&conv_bn_relu_frozen));
  m.impl("conv_bn_relu_frozen_backward", TORCH_BOX(&conv_bn_relu_frozen_backward));
  m.impl("conv_relu", TORCH_BOX(&conv_relu));
  m.impl("conv_relu_pack", TORCH_BOX(&conv_relu_pack));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_backward_reduce", TORCH_BOX(&batch_norm_relu_backward_reduce));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace torchweld::ops
