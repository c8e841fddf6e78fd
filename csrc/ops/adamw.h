// What every back end of the AdamW ops checks and derives before it touches memory.
#pragma once

#include "ops/torch_compat.h"

namespace torchweld::ops {

// A tensor as the kernels see it: a complex one is twice as many reals.
struct RealType {
  kernels::DType dtype;
  int64_t per_element;
};
std::optional<RealType> real_type(ScalarType type);

// Throws unless the lists fit each other tensor by tensor. Strides may differ.
void check_adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                      const TensorList& state_steps, bool amsgrad);

void check_grad_norm(const TensorList& grads);

// True if the elements fill one run of memory without gaps or overlap, in whatever order.
bool is_dense(const Tensor& tensor);

// True if equal indices lie at equal offsets. The shapes are equal.
bool same_layout(const Tensor& a, const Tensor& b);

}  // namespace torchweld::ops
