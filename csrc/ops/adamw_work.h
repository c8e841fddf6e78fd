// What the back ends of an AdamW step are given, checked.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "ops/adamw_aligned.h"
#include "ops/adamw_plan.h"

namespace torchweld::ops {

// Of one group, as torch's param groups give them.
struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  std::optional<Tensor> lr_tensor = std::nullopt;  // float64 or float32, in place of lr
};

// Of all groups of a plan; see _adamw_run in schema.cpp.
std::vector<AdamWHyper> groups_of(const char* op, const AdamWPlan& plan,
                                  const std::vector<double>& hyper, const TensorList& lrs);

// Throws unless each is a scalar beside the parameters.
void check_scalars(const char* op, const AdamWPlan& plan, const std::optional<Tensor>& loss_scale,
                   const std::optional<Tensor>& sum_of_squares);

// An entry of a plan in a step, between its checks and its writes.
struct AdamWWork {
  AdamWEntry* entry;
  bool uniform;                      // as before
  std::unique_ptr<Aligned> aligned;  // where tensors do not lie alike
  kernels::AdamWSpan span;           // index 0
  MemoryRange home;                  // of the parameter, also where `span` is of a copy

  kernels::DType dtype() const { return entry->type.dtype; }
  float* step() const { return static_cast<float*>(entry->data[kStep]); }
  char* average() const { return static_cast<char*>(entry->data[kAverage]); }
  char* bfloat16_weight() const { return static_cast<char*>(entry->data[kBFloat16Weight]); }
  bool is_observed() const { return average() != nullptr || bfloat16_weight() != nullptr; }

  // All but span.grad, which is there, and `aligned`.
  void fill();
};

// Checks everything. grads[k] is the gradient of entry which[k], or of entry k if `which` is empty;
// they outlive the work. `op`: for messages.
std::vector<AdamWWork> work_of(const char* op, AdamWPlan& plan,
                               const std::vector<AtenTensorHandle>& grads, const IntList& which);

// The lists of adamw_step_.
struct AdamWLists {
  const TensorList &params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &state_steps;
};

// Adds parameters with states like them to a plan; returns the gradients. Throws unless there is
// one tensor in each list for each parameter, and grad_scale is a scalar beside them.
std::vector<AtenTensorHandle> plan_lists(const char* op, AdamWPlan& plan, const AdamWLists& lists,
                                         bool amsgrad, const std::optional<Tensor>& grad_scale);

}  // namespace torchweld::ops
