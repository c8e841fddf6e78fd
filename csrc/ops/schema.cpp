// Every operator's schema. A schema lives in C++ because one defined in Python is unknown to a
// program that loads a TorchScript file (https://github.com/pytorch/pytorch/issues/143773).
#include "ops/torch_compat.h"

STABLE_TORCH_LIBRARY(torchweld, m) {
  // One AdamW step over all tensors, in place. Tensor k of every list has the shape, strides and
  // dtype of param k; max_exp_avg_sqs is empty unless amsgrad; state_steps[k] is a float32 scalar
  // that already counts this step. grad_scale multiplies every gradient and is not written back.
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor[] state_steps, *, float lr, "
      "float beta1, float beta2, float weight_decay, float eps, bool amsgrad, bool maximize, "
      "Tensor? grad_scale=None) -> ()");
  // 2-norm over all elements of all tensors, accumulated in float64 in an order fixed by the sizes
  // alone: a float64 scalar.
  m.def("grad_norm(Tensor[] grads) -> Tensor");

  // --- conv_bn_relu ------------------------------------------------------------------------------
  // input, weight, bias, residual and outputs of one dtype: float32, float64, bfloat16 or float16;
  // bn_* and running_* of that dtype, or float32 beside a 16-bit one. Shapes and arguments are those
  // of torch.conv2d; residual has the output's shape. activation is identity, relu, relu6,
  // leaky_relu, silu or hardswish; negative_slope is leaky_relu's. Statistics are float64 [C].

  // activation(batch_norm(conv(input)) + residual) with the statistics of this batch. Also returns
  // what the backward needs (the convolution's output, mean, 1 / sqrt(var + eps)) and the biased
  // variance, which update_running_stats needs and a small one could not be got back from invstd.
  m.def(
      "conv_bn_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, float eps, str "
      "activation, float negative_slope) -> (Tensor output, Tensor conv_output, Tensor mean, Tensor "
      "invstd, Tensor var)");
  // Gradients for input, weight, bias, bn_weight, bn_bias and residual; those whose output_mask is
  // false are not computed, and an empty tensor stands in their place. bias gets zeros: batch
  // statistics cancel it.
  m.def(
      "conv_bn_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, Tensor conv_output, Tensor mean, Tensor invstd, int[] "
      "stride, int[] padding, int[] dilation, int groups, str activation, float negative_slope, "
      "bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same with running statistics, which get no gradient.
  m.def(
      "conv_bn_relu_frozen(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, Tensor? "
      "bn_bias, Tensor running_mean, Tensor running_var, Tensor? residual, int[] stride, int[] "
      "padding, int[] dilation, int groups, float eps, str activation, float negative_slope) -> "
      "(Tensor output, Tensor conv_output)");
  m.def(
      "conv_bn_relu_frozen_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? "
      "bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, Tensor? residual, Tensor "
      "conv_output, int[] stride, int[] padding, int[] dilation, int groups, float eps, str "
      "activation, float negative_slope, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  // activation(conv(input) + residual), batch norm folded into weight and bias. No gradient.
  m.def(
      "conv_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] "
      "padding, int[] dilation, int groups, str activation, float negative_slope) -> Tensor");
  // running <- (1 - momentum) * running + momentum * batch, with the unbiased variance. count is the
  // values per channel; 0 changes nothing.
  m.def(
      "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor "
      "var, SymInt count, float momentum) -> ()");
  // Values per channel (float64 [1]), their mean, and the sum of squared deviations from it: what
  // processes exchange to normalize with the statistics of all of them.
  m.def("batch_norm_stats(Tensor input) -> (Tensor count, Tensor mean, Tensor m2)");
  // activation(batch_norm(input) + residual) with given statistics.
  m.def(
      "batch_norm_relu(Tensor input, Tensor mean, Tensor invstd, Tensor? bn_weight, Tensor? bn_bias, "
      "Tensor? residual, str activation, float negative_slope) -> Tensor");
  // With g = grad_output * activation': sum of g (the gradient of bn_bias) and of g * xhat (that of
  // bn_weight) over this process's values.
  m.def(
      "batch_norm_relu_backward_reduce(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, str activation, float negative_slope) "
      "-> (Tensor sum_g, Tensor sum_g_xhat)");
  // Gradients for input and residual (empty without one), given both sums and the count of values
  // per channel (float64 [1]) over all processes.
  m.def(
      "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor sum_g, Tensor sum_g_xhat, Tensor "
      "count, str activation, float negative_slope) -> (Tensor grad_input, Tensor grad_residual)");
}
