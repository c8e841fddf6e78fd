// What every back end of the AdamW ops checks before it touches memory.
#pragma once

#include "ops/torch_compat.h"

namespace torchweld::ops {

// Throws unless the lists fit each other tensor by tensor.
void check_adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                      const TensorList& state_steps, bool amsgrad);

// True if the elements fill one run of memory without gaps or overlap, in whatever order.
bool is_dense(const Tensor& tensor);

}  // namespace torchweld::ops
