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

  // activation(input @ (weight_scale * weight)^T + bias) with every row of input quantized on the
  // fly to int8. input [..., K] float32, bfloat16 or float16, any strides; the output has its dtype.
  // K = in_features. packed_weight int8 [ceil(N/16), ceil(K/4), 16, 4] within [-127, 127], zero
  // padded; weight_scale float32 [N]; weight_sum int32 [ceil(N/16) * 16], the sum over k of every
  // column of packed_weight; bias floating point [N]. activation: identity, relu, gelu, gelu_tanh or
  // silu. Same bits on every CPU instruction set, for any number of threads and of rows.
  m.def(
      "quantized_linear(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_sum, Tensor? bias, int in_features, str activation=\"identity\") -> Tensor");
  // The integers inside: int32 sums [..., N] and the float32 scale [...] of every row of input.
  m.def(
      "quantized_linear_accumulators(Tensor input, Tensor packed_weight, Tensor weight_scale, "
      "Tensor weight_sum, int in_features) -> (Tensor, Tensor)");
  // grad @ (weight_scale * weight), the weight rounded to grad's dtype: [..., N] -> [..., K].
  m.def(
      "quantized_linear_backward(Tensor grad, Tensor packed_weight, Tensor weight_scale, "
      "int in_features) -> Tensor");
}
