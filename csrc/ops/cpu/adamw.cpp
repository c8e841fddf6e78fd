#include "ops/adamw.h"

#include <cmath>
#include <memory>

#include "ops/cpu/adamw_run.h"
#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

double scalar(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? *tensor.const_data_ptr<double>()
                                                    : *tensor.const_data_ptr<float>();
}

Tensor vector_of(std::initializer_list<double> values) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return result;
}

void adamw_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                 TensorList max_exp_avg_sqs, TensorList state_steps, double lr, double beta1,
                 double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                 std::optional<Tensor> grad_scale) {
  constexpr const char* op = "adamw_step_";
  AdamWPlan plan;
  const std::vector<AtenTensorHandle> handles =
      plan_lists(op, plan, {params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps},
                 amsgrad, grad_scale);
  if (params.empty()) return;
  NoGradGuard no_grad;
  AdamWRun(op, plan, handles, {})
      .step({{lr, beta1, beta2, eps, weight_decay, maximize}},
            grad_scale ? scalar(*grad_scale) : 1.0);
}

Tensor grad_norm(TensorList grads) {
  check_grad_norm("grad_norm", grads);
  NoGradGuard no_grad;
  Tensor norm = torch::stable::empty({}, ScalarType::Double);
  *norm.mutable_data_ptr<double>() = std::sqrt(sum_of_squares(grads));
  return norm;
}

Tensor adamw_plan(TensorList tensors, Tensor places) {
  return to_tensor(std::make_unique<AdamWPlan>(std::move(tensors), places));
}

Tensor adamw_run(Tensor plan_bytes, const Handles& grads, IntList which, std::vector<double> hyper,
                 TensorList lrs, std::optional<double> max_grad_norm,
                 std::optional<Tensor> loss_scale, std::optional<Tensor> sum_of_squares,
                 bool skip_nonfinite, int64_t seed, bool statistics, double average_weight) {
  constexpr const char* op = "_adamw_run";
  AdamWPlan& plan = to_plan(plan_bytes);
  std::vector<AdamWHyper> groups = groups_of(op, plan, hyper, lrs);
  check_scalars(op, plan, loss_scale, sum_of_squares);
  for (AdamWHyper& group : groups) {
    if (group.lr_tensor) group.lr = scalar(*group.lr_tensor);
  }

  NoGradGuard no_grad;
  AdamWRun run(op, plan, grads.get(), which);
  const double unscale = loss_scale ? 1 / scalar(*loss_scale) : 1.0;
  const bool may_skip = loss_scale || skip_nonfinite;
  double norm = NAN, clip = 1;
  int64_t nonfinite = 0;
  if (may_skip || max_grad_norm || statistics) {
    const double sum = sum_of_squares ? scalar(*sum_of_squares) : run.sum_of_squares();
    norm = std::sqrt(sum) * unscale;
    if (max_grad_norm) {
      clip = *max_grad_norm / (norm + 1e-6);
      if (clip > 1) clip = 1;  // NaN stays
    }
    if (may_skip && !std::isfinite(norm)) {
      // The squares of float64 may overflow where no gradient does.
      nonfinite = run.count_nonfinite();
      const bool elsewhere = sum_of_squares.has_value();
      if (nonfinite > 0 || elsewhere) {
        return vector_of({norm, 1, NAN, 0, static_cast<double>(nonfinite)});
      }
    }
  }
  const kernels::AdamWStatistics seen =
      run.step(groups, unscale * clip, {static_cast<uint64_t>(seed), average_weight, statistics});
  return vector_of({norm, 0, std::sqrt(seen.update_squares), run.share(seen.lost),
                    static_cast<double>(seen.nonfinite)});
}

Tensor adamw_sum_of_squares(TensorList grads) {
  check_grad_norm("_adamw_sum_of_squares", grads);
  NoGradGuard no_grad;
  return vector_of({sum_of_squares(grads)});
}

void adamw_encode(Tensor values, bool is_signed, Tensor codes, Tensor scales) {
  check_blocks("_adamw_encode", values, codes, scales);
  const kernels::AdamWKernels& k = *cpu_kernels().adamw;
  (is_signed ? k.encode_exp_avg : k.encode_exp_avg_sq)(
      values.const_data_ptr<float>(), values.numel(),
      static_cast<uint8_t*>(codes.mutable_data_ptr()), scales.mutable_data_ptr<float>());
}

void adamw_decode(Tensor codes, Tensor scales, bool is_signed, Tensor values) {
  check_blocks("_adamw_decode", values, codes, scales);
  const kernels::AdamWKernels& k = *cpu_kernels().adamw;
  (is_signed ? k.decode_exp_avg : k.decode_exp_avg_sq)(
      static_cast<const uint8_t*>(codes.const_data_ptr()), scales.const_data_ptr<float>(),
      values.numel(), values.mutable_data_ptr<float>());
}

}  // namespace

// A plan only holds what it is given, wherever that lies.
STABLE_TORCH_LIBRARY_IMPL(torchweld, CompositeExplicitAutograd, m) {
  m.impl("_adamw_plan", TORCH_BOX(&adamw_plan));
}

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("_adamw_run", TORCH_BOX(&adamw_run));
  m.impl("_adamw_sum_of_squares", TORCH_BOX(&adamw_sum_of_squares));
  m.impl("_adamw_encode", TORCH_BOX(&adamw_encode));
  m.impl("_adamw_decode", TORCH_BOX(&adamw_decode));
}

}  // namespace torchweld::ops
