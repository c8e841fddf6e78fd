// Every operator's schema. A schema lives in C++ because one defined in Python is unknown to a
// program that loads a TorchScript file (https://github.com/pytorch/pytorch/issues/143773).
#include "ops/torch_compat.h"

STABLE_TORCH_LIBRARY(torchweld, m) {
  // One AdamW step over all tensors, in place. Tensor k of every list has the shape and dtype of
  // param k, with any strides; max_exp_avg_sqs is empty unless amsgrad; state_steps[k] is a float32
  // scalar that counts the steps done, this one not yet. grad_scale (float64 scalar) multiplies
  // every gradient and is not written back.
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, *, "
      "float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad, "
      "bool maximize, Tensor? grad_scale=None) -> ()");
  // 2-norm over all elements of all tensors, accumulated in float64 in an order fixed by the sizes
  // alone: a float64 scalar.
  m.def("grad_norm(Tensor[] grads) -> Tensor");

  // --- what tw.optim.AdamW is made of ------------------------------------------------------------
  // A plan holds parameters and states from step to step: an opaque uint8 tensor that frees them
  // and must not be copied. Row k of places (int64) is: group, id (for random bits), AdamWState,
  // AdamWRounding, offset, row, stride (of a shard; see AdamWEntry), then the places in `tensors`
  // of what AdamWRole lists, -1 for none.
  m.def("_adamw_plan(Tensor[] tensors, Tensor places) -> Tensor");
  // One step over all groups; everything is checked before anything is written. grads[k] belongs to
  // row which[k] of the plan, row k if `which` is empty. All tensors are on one device. hyper: lr,
  // beta1, beta2, eps, weight_decay, maximize of each group. lrs: empty, or for each group its
  // learning rate as a float64 or float32 scalar, or a tensor of no elements: then hyper's counts.
  // On CUDA it is read when the step runs, as is loss_scale. Gradients are divided by loss_scale,
  // then clipped to max_grad_norm, and not written. Nothing is written either if a gradient is not
  // finite and there is a loss_scale or skip_nonfinite. sum_of_squares (float64 scalar), of the
  // gradients before loss_scale: given where these are only a part of them. Averages move by
  // average_weight. Returns float64 [5]: norm of the gradients (NaN if it was not needed), 1 if
  // skipped, and with statistics norm of the update, share of the elements whose update was lost,
  // gradients not finite.
  m.def(
      "_adamw_run(Tensor(a!) plan, Tensor[] grads, int[] which, float[] hyper, Tensor[] lrs, "
      "float? max_grad_norm, Tensor? loss_scale, Tensor? sum_of_squares, bool skip_nonfinite, "
      "int seed, bool statistics, float average_weight) -> Tensor");
  // float64 [1]: the square of grad_norm.
  m.def("_adamw_sum_of_squares(Tensor[] grads) -> Tensor");
  // 8-bit states from and to float32 tensors that lie as the codes do, without gaps. A signed one
  // is exp_avg, an unsigned one exp_avg_sq.
  m.def("_adamw_encode(Tensor values, bool is_signed, Tensor(a!) codes, Tensor(b!) scales) -> ()");
  m.def("_adamw_decode(Tensor codes, Tensor scales, bool is_signed, Tensor(a!) values) -> ()");

  // --- conv_bn_relu ------------------------------------------------------------------------------
  // input, weight, bias, residual and outputs of one dtype: float32, float64, bfloat16 or float16;
  // bn_* and running_* of that dtype, or float32 beside a 16-bit one. Shapes and arguments are
  // those of torch.conv2d; residual has the output's shape. activation is identity, relu, relu6,
  // leaky_relu, silu or hardswish; negative_slope is leaky_relu's. Statistics are float64 [C].

  // activation(batch_norm(conv(input)) + residual) with the statistics of this batch. Also returns
  // what the backward needs (the convolution's output, mean, 1 / sqrt(var + eps)) and the biased
  // variance, which update_running_stats needs and a small one could not be got back from invstd.
  m.def(
      "conv_bn_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "int groups, float eps, str activation, float negative_slope) -> (Tensor output, "
      "Tensor conv_output, Tensor mean, Tensor invstd, Tensor var)");
  // Gradients for input, weight, bias, bn_weight, bn_bias and residual; those whose output_mask is
  // false are not computed, and an empty tensor stands in their place. bias gets zeros: batch
  // statistics cancel it.
  m.def(
      "conv_bn_relu_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, Tensor conv_output, Tensor mean, Tensor invstd, "
      "int[] stride, int[] padding, int[] dilation, int groups, str activation, "
      "float negative_slope, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  // The same with running statistics, which get no gradient.
  m.def(
      "conv_bn_relu_frozen(Tensor input, Tensor weight, Tensor? bias, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor running_mean, Tensor running_var, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, int groups, float eps, str activation, "
      "float negative_slope) -> (Tensor output, Tensor conv_output)");
  m.def(
      "conv_bn_relu_frozen_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor running_mean, Tensor running_var, "
      "Tensor? residual, Tensor conv_output, int[] stride, int[] padding, int[] dilation, "
      "int groups, float eps, str activation, float negative_slope, bool[] output_mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // activation(conv(input) + residual), batch norm folded into weight and bias. No gradient.
  // packed_weight is what conv_relu_pack made of this very weight: it saves the packing, where the
  // algorithm chosen for this input is the one it was packed for.
  m.def(
      "conv_relu(Tensor input, Tensor weight, Tensor? packed_weight, Tensor? bias, "
      "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, "
      "str activation, float negative_slope) -> Tensor");
  // The weight as the algorithm expected to be fastest reads it: float32 [1, 1, 1, L], the same for
  // every instruction set; L is 0 where that algorithm is ATen's.
  m.def(
      "conv_relu_pack(Tensor weight, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> Tensor");
  // running <- (1 - momentum) * running + momentum * batch, with the unbiased variance. count is
  // the values per channel; 0 changes nothing.
  m.def(
      "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, "
      "Tensor var, SymInt count, float momentum) -> ()");
  // Values per channel (float64 [1]), their mean, and the sum of squared deviations from it: what
  // processes exchange to normalize with the statistics of all of them.
  m.def("batch_norm_stats(Tensor input) -> (Tensor count, Tensor mean, Tensor m2)");
  // activation(batch_norm(input) + residual) with given statistics.
  m.def(
      "batch_norm_relu(Tensor input, Tensor mean, Tensor invstd, Tensor? bn_weight, "
      "Tensor? bn_bias, Tensor? residual, str activation, float negative_slope) -> Tensor");
  // With g = grad_output * activation': sum of g (the gradient of bn_bias) and of g * xhat (that of
  // bn_weight) over this process's values.
  m.def(
      "batch_norm_relu_backward_reduce(Tensor grad_output, Tensor input, Tensor mean, "
      "Tensor invstd, Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, str activation, "
      "float negative_slope) -> (Tensor sum_g, Tensor sum_g_xhat)");
  // Gradients for input and residual (empty without one), given both sums and the count of values
  // per channel (float64 [1]) over all processes.
  m.def(
      "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, "
      "Tensor? bn_weight, Tensor? bn_bias, Tensor? residual, Tensor sum_g, Tensor sum_g_xhat, "
      "Tensor count, str activation, float negative_slope) -> (Tensor grad_input, "
      "Tensor grad_residual)");

  // --- max_pool2d --------------------------------------------------------------------------------
  // torch.max_pool2d: on the CPU, 4-D float32 and bfloat16 in channels_last memory with windows of
  // at most 256 taps and 32 times the stride is pooled by kernels of ours, everything else by
  // ATen's. The arguments are torch's; an empty stride is that of the window.
  m.def(
      "max_pool2d(Tensor input, int[2] kernel_size, int[2] stride=[], int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> Tensor");
  // The same, with kernels of ours or an error, and which tap of its window each output is (uint8
  // [N, C, H_out, W_out], row by row): what the backward needs.
  m.def(
      "max_pool2d_with_positions(Tensor input, int[2] kernel_size, int[2] stride=[], "
      "int[2] padding=0, int[2] dilation=1, bool ceil_mode=False) -> (Tensor output, "
      "Tensor positions)");
  // The gradient for an input of this height and width; stride is not empty.
  m.def(
      "max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt height, SymInt width, "
      "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor");

  // --- one algorithm of our own, for tests and measurements --------------------------------------
  // clamp(conv(input) + bias + residual, low, high) of float32 tensors by the named algorithm, an
  // error where it cannot compute the shape; and, if asked for, float64 [3, C]: values per channel,
  // their mean, and the sum of squared deviations from it.
  m.def(
      "_conv_forward(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, int groups, float low, float high, str algorithm, "
      "bool moments) -> (Tensor output, Tensor count_mean_m2)");
  // Gradients for input and weight; an empty tensor in place of one that is not asked for.
  m.def(
      "_conv_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, int groups, str algorithm, bool input_grad, "
      "bool weight_grad) -> (Tensor, Tensor)");

  // torchweld::convolution_algorithm() as a number, for the library of the CUDA operators.
  m.def("_convolution_algorithm() -> int");

  // A contiguous copy of a packed int8 or uint8 weight where reading it is fastest.
  m.def("_in_huge_pages(Tensor packed_weight) -> Tensor");

  // activation(input @ (weight_scale * weight)^T + bias) + residual with every row of input
  // quantized on the fly to int8. input [..., K] float32, bfloat16 or float16, any strides; the
  // output has its dtype. K = in_features. packed_weight int8 [ceil(N/16), ceil(K/4), 16, 4] within
  // [-127, 127], zero padded; weight_scale float32 [N]; weight_sum int32 [ceil(N/16) * 16], the sum
  // over k of every column of packed_weight; bias floating point [N]; residual floating point, the
  // output's shape. activation: identity, relu, gelu, gelu_tanh or silu. Rows have one scale each
  // if input_group_size is 0, else one for every so many k. Same bits on every CPU instruction set,
  // for any number of threads and of rows.
  m.def(
      "quantized_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_sum, Tensor? bias, Tensor? residual, int in_features, "
      "str activation=\"identity\", int input_group_size=0) -> Tensor");
  // The integers inside: int32 sums [..., N] and the float32 scale [...] of every row of input.
  m.def(
      "quantized_linear_accumulators(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_sum, int in_features) -> (Tensor, Tensor)");
  // grad @ (weight_scale * weight) in float32, rounded once to grad's dtype: [..., N] -> [..., K].
  // The weight is turned into floats by tiles. Also the gradient of weight_only_linear.
  m.def(
      "quantized_linear_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale, "
      "int in_features) -> Tensor");
  // activation(input @ (weight_scale * weight)^T + bias) + residual with activations left floating
  // point; the arguments are those of quantized_linear. Same bits on every CPU instruction set, for
  // any number of threads and of rows. CUDA sums in another order, which shape alone decides.
  m.def(
      "weight_only_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, Tensor? bias, "
      "Tensor? residual, int in_features, str activation=\"identity\") -> Tensor");

  // The same with a weight of 4 bits, (u - zero) * scale in groups of K, and activations quantized
  // per row to int8. packed_weight uint8 [ceil(N/16), groups * group_size / 8, 16, 4]: byte i of
  // octet j holds k = 8 j + i in the low bits and 8 j + 4 + i in the high ones; weight_scale
  // bfloat16 and weight_zero uint8, within 15, [ceil(N/16), groups, 16]. groups = ceil(K /
  // group_size). Scales that pad N are 0. K = in_features, N = out_features. Same bits on every CPU
  // instruction set and on CUDA, for any number of threads and of rows. CUDA does not look at
  // zeros.
  m.def(
      "quantized_linear_int4(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_zero, Tensor? bias, Tensor? residual, int in_features, int out_features, "
      "str activation=\"identity\") -> Tensor");
  // The integers inside: int32 sums [..., groups, N] and the float32 scale [...] of every row.
  m.def(
      "quantized_linear_int4_accumulators(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_zero, int in_features, int out_features) -> (Tensor, Tensor)");
  // grad @ weight in float32, rounded once to grad's dtype: [..., N] -> [..., K].
  m.def(
      "quantized_linear_int4_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_zero, int in_features, int out_features) -> Tensor");
}
