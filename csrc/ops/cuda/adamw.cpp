#include "ops/adamw.h"

#include "ops/adamw_aligned.h"
#include "ops/check.h"
#include "ops/cuda/adamw_run.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using kernels::kAdamWSumPiece;

// --- norm ----------------------------------------------------------------------------------------
Tensor norm(const char* op, const TensorList& tensors, bool root, const IntList& shape) {
  TORCHWELD_CHECK(!tensors.empty(), op, "grads", "a tensor", "none");
  check_grad_norm(op, tensors);
  NoGradGuard no_grad;
  const CudaContext context(op, tensors[0]);
  std::vector<Aligned> aligned;
  std::vector<Values> values;
  aligned.reserve(tensors.size());
  ChunkRuns pieces(kAdamWSumPiece);
  for (size_t k = 0; k < tensors.size(); ++k) {
    const RealType type = *real_type(tensors[k].scalar_type());
    const void* data = aligned.emplace_back(tensors[k]).read(tensors[k]);
    values.push_back({data, tensors[k].numel() * type.per_element, type.dtype});
    pieces.add(k, values.back().size);
  }
  CudaScratch scratch;
  const auto value_bytes = static_cast<int64_t>(values.size() * sizeof(Values));
  const auto run_bytes = static_cast<int64_t>(pieces.runs().size() * sizeof(ChunkRun));
  const auto tensors_at = scratch.reserve<char>(value_bytes + run_bytes);  // written at once
  const auto runs_at = tensors_at + value_bytes;
  const auto pieces_at = scratch.reserve<Chunk>(pieces.end());
  const auto squares_at = scratch.reserve<double>(pieces.end());
  const auto nonfinite_at = scratch.reserve<int64_t>(pieces.end());
  scratch.allocate(tensors[0]);
  Words words;
  append(words, values);
  append(words, pieces.runs());
  context.check(launch_write(scratch.at<Values>(tensors_at), words.data(),
                             static_cast<int64_t>(words.size() * sizeof(uint64_t)),
                             context.stream()));
  context.check(launch_chunks(scratch.at<ChunkRun>(runs_at),
                              static_cast<int64_t>(pieces.runs().size()),
                              scratch.at<Chunk>(pieces_at), context.stream()));
  context.check(launch_sum_of_squares({.tensors = scratch.at<Values>(tensors_at),
                                       .pieces = scratch.at<Chunk>(pieces_at),
                                       .count = pieces.end(),
                                       .squares = scratch.at<double>(squares_at),
                                       .nonfinite = scratch.at<int64_t>(nonfinite_at)},
                                      context.stream()));
  Tensor result = torch::stable::new_empty(tensors[0], shape, ScalarType::Double);
  context.check(launch_total({.squares = scratch.at<double>(squares_at),
                              .count = pieces.end(),
                              .root = root,
                              .total = result.mutable_data_ptr<double>()},
                             context.stream()));
  return result;
}

Tensor grad_norm(TensorList grads) { return norm("grad_norm", grads, true, {}); }

Tensor adamw_sum_of_squares(TensorList grads) {
  return norm("_adamw_sum_of_squares", grads, false, {1});
}

// --- step ----------------------------------------------------------------------------------------
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
  AdamWCudaOptions options;
  if (grad_scale) options.grad_scale = grad_scale->const_data_ptr<double>();
  adamw_run_on_cuda(op, plan, handles, {}, {{lr, beta1, beta2, eps, weight_decay, maximize}},
                    options);
}

Tensor adamw_run(Tensor plan_bytes, const Handles& grads, IntList which, std::vector<double> hyper,
                 TensorList lrs, std::optional<double> max_grad_norm,
                 std::optional<Tensor> loss_scale, std::optional<Tensor> sum_of_squares,
                 bool skip_nonfinite, int64_t seed, bool statistics, double average_weight) {
  constexpr const char* op = "_adamw_run";
  AdamWPlan& plan = to_plan(plan_bytes);
  const std::vector<AdamWHyper> groups = groups_of(op, plan, hyper, lrs);
  check_scalars(op, plan, loss_scale, sum_of_squares);
  return adamw_run_on_cuda(op, plan, grads.get(), which, groups,
                           {.max_grad_norm = max_grad_norm,
                            .loss_scale = loss_scale,
                            .sum_of_squares = sum_of_squares,
                            .skip_nonfinite = skip_nonfinite,
                            .seed = static_cast<uint64_t>(seed),
                            .statistics = statistics,
                            .average_weight = average_weight});
}

// --- 8-bit states --------------------------------------------------------------------------------
AdamWCodeParams code_params(const Tensor& values, const Tensor& codes, const Tensor& scales,
                            bool is_signed) {
  return {.values = static_cast<float*>(const_cast<void*>(values.const_data_ptr())),
          .codes = static_cast<uint8_t*>(const_cast<void*>(codes.const_data_ptr())),
          .scales = static_cast<float*>(const_cast<void*>(scales.const_data_ptr())),
          .size = values.numel(),
          .is_signed = is_signed};
}

void adamw_encode(Tensor values, bool is_signed, Tensor codes, Tensor scales) {
  constexpr const char* op = "_adamw_encode";
  check_blocks(op, values, codes, scales);
  const CudaContext context(op, values);
  context.check(
      launch_adamw_encode(code_params(values, codes, scales, is_signed), context.stream()));
}

void adamw_decode(Tensor codes, Tensor scales, bool is_signed, Tensor values) {
  constexpr const char* op = "_adamw_decode";
  check_blocks(op, values, codes, scales);
  const CudaContext context(op, values);
  context.check(
      launch_adamw_decode(code_params(values, codes, scales, is_signed), context.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("_adamw_sum_of_squares", TORCH_BOX(&adamw_sum_of_squares));
  m.impl("_adamw_run", TORCH_BOX(&adamw_run));
  m.impl("_adamw_encode", TORCH_BOX(&adamw_encode));
  m.impl("_adamw_decode", TORCH_BOX(&adamw_decode));
}

}  // namespace torchweld::ops
