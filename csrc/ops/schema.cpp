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
}
