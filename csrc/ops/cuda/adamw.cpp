#include "ops/adamw.h"

#include "ops/adamw_aligned.h"
#include "ops/check.h"
#include "ops/cuda/adamw_tables.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using kernels::DType;

void check_scalar(const char* op, const char* argument, const Tensor& tensor, ScalarType dtype,
                  const Tensor& param) {
  TORCHWELD_CHECK(
      tensor.device() == param.device() && tensor.scalar_type() == dtype && tensor.numel() == 1, op,
      argument, "a " << dtype_name(dtype) << " scalar on the device of params",
      dtype_name(tensor.scalar_type()) << " of shape " << shape_string(tensor));
}

// --- norm ----------------------------------------------------------------------------------------
Tensor norm(const char* op, const TensorList& tensors, bool root, const IntList& shape) {
  TORCHWELD_CHECK(!tensors.empty(), op, "grads", "a tensor", "none");
  check_grad_norm(tensors);
  for (const Tensor& tensor : tensors) {
    TORCHWELD_CHECK(tensor.device() == tensors[0].device(), op, "grads", "tensors on one device",
                    "another");
  }
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
  const auto tensors_at = scratch.reserve<Values>(static_cast<int64_t>(values.size()));
  const auto runs_at = scratch.reserve<ChunkRun>(static_cast<int64_t>(pieces.runs().size()));
  const auto pieces_at = scratch.reserve<Chunk>(pieces.count());
  const auto squares_at = scratch.reserve<double>(pieces.count());
  const auto nonfinite_at = scratch.reserve<int64_t>(pieces.count());
  scratch.allocate(tensors[0]);
  write(context, scratch.at<Values>(tensors_at), values);
  write(context, scratch.at<ChunkRun>(runs_at), pieces.runs());
  context.check(launch_chunks(scratch.at<ChunkRun>(runs_at),
                              static_cast<int64_t>(pieces.runs().size()),
                              scratch.at<Chunk>(pieces_at), context.stream()));
  context.check(launch_sum_of_squares({.tensors = scratch.at<Values>(tensors_at),
                                       .pieces = scratch.at<Chunk>(pieces_at),
                                       .count = pieces.count(),
                                       .squares = scratch.at<double>(squares_at),
                                       .nonfinite = scratch.at<int64_t>(nonfinite_at)},
                                      context.stream()));
  Tensor result = torch::stable::new_empty(tensors[0], shape, ScalarType::Double);
  context.check(launch_total({.squares = scratch.at<double>(squares_at),
                              .count = pieces.count(),
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
// Tensors between their checks and a step.
struct StepLists {
  std::vector<Aligned> aligned;
  std::vector<AdamWKind> kinds;
  std::vector<AdamWTensor> tensors;
  std::vector<Values> grads;
};

void step(const CudaContext& context, const Tensor& device, const StepLists& lists,
          const AdamWGroup& group, const double* grad_scale) {
  const auto count = static_cast<int64_t>(lists.tensors.size());
  int64_t elements = 0;
  for (const Values& grad : lists.grads) elements += grad.size;
  ChunkRuns runs(adamw_chunk_size(elements, context.multiprocessors()));
  const std::vector<AdamWBatch> batches = batches_of(lists.tensors, lists.kinds, runs);
  const auto run_count = static_cast<int64_t>(runs.runs().size());

  CudaScratch scratch;
  const auto tensors = scratch.reserve<AdamWTensor>(count);
  const auto grads = scratch.reserve<Values>(count);
  const auto groups = scratch.reserve<AdamWGroup>(1);
  const auto runs_at = scratch.reserve<ChunkRun>(run_count);
  const auto chunks = scratch.reserve<Chunk>(runs.count());
  const auto scalars = scratch.reserve<kernels::AdamWScalars>(count);
  const auto skipped = scratch.reserve<int32_t>(1);
  const auto report = scratch.reserve<double>(5);
  scratch.allocate(device);
  write(context, scratch.at<AdamWTensor>(tensors), lists.tensors);
  write(context, scratch.at<Values>(grads), lists.grads);
  write(context, scratch.at<AdamWGroup>(groups), std::vector<AdamWGroup>{group});
  write(context, scratch.at<ChunkRun>(runs_at), runs.runs());
  context.check(launch_chunks(scratch.at<ChunkRun>(runs_at), run_count, scratch.at<Chunk>(chunks),
                              context.stream()));

  AdamWPrepareParams prepare{};
  prepare.grad_scale = grad_scale;
  prepare.tensors = scratch.at<AdamWTensor>(tensors);
  prepare.grads = scratch.at<Values>(grads);
  prepare.count = count;
  prepare.groups = scratch.at<AdamWGroup>(groups);
  prepare.scalars = scratch.at<kernels::AdamWScalars>(scalars);
  prepare.skipped = scratch.at<int32_t>(skipped);
  prepare.report = scratch.at<double>(report);
  context.check(launch_adamw_prepare(prepare, context.stream()));
  for (const AdamWBatch& batch : batches) {
    context.check(launch_adamw_step(batch.kind,
                                    {.tensors = prepare.tensors,
                                     .grads = prepare.grads,
                                     .scalars = prepare.scalars,
                                     .skipped = prepare.skipped,
                                     .chunks = scratch.at<Chunk>(chunks) + batch.first,
                                     .count = batch.count,
                                     .chunk_size = runs.chunk_size()},
                                    context.stream()));
  }
}

void adamw_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                 TensorList max_exp_avg_sqs, TensorList state_steps, double lr, double beta1,
                 double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                 std::optional<Tensor> grad_scale) {
  constexpr const char* op = "adamw_step_";
  check_lengths(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  if (params.empty()) return;
  TORCHWELD_CHECK(params[0].is_cuda(), op, "params", "tensors on CUDA beside others there",
                  "one elsewhere at 0");
  if (grad_scale) check_scalar(op, "grad_scale", *grad_scale, ScalarType::Double, params[0]);
  for (size_t k = 0; k < params.size(); ++k) {
    const ScalarType type = params[k].scalar_type();
    TORCHWELD_CHECK(real_type(type), op, "params", kAdamWDTypes, dtype_name(type));
    const auto check = [&](const char* argument, const Tensor& tensor, bool written) {
      check_like_param(op, argument, tensor, params[k], type, k, written);
    };
    TORCHWELD_CHECK(params[k].device() == params[0].device(), op, "params", "tensors on one device",
                    "another at " << k);
    check("params", params[k], true);
    check("grads", grads[k], false);
    check("exp_avgs", exp_avgs[k], true);
    check("exp_avg_sqs", exp_avg_sqs[k], true);
    if (amsgrad) check("max_exp_avg_sqs", max_exp_avg_sqs[k], true);
    check_scalar(op, "state_steps", state_steps[k], ScalarType::Float, params[0]);
  }

  NoGradGuard no_grad;
  const CudaContext context(op, params[0]);
  StepLists lists;
  for (size_t k = 0; k < params.size(); ++k) {
    const RealType type = *real_type(params[k].scalar_type());
    Aligned& aligned = lists.aligned.emplace_back(params[k]);
    AdamWTensor tensor{};
    tensor.span.param = aligned.update(params[k]);
    tensor.span.exp_avg = aligned.update(exp_avgs[k]);
    tensor.span.exp_avg_sq = aligned.update(exp_avg_sqs[k]);
    if (amsgrad) tensor.span.max_exp_avg_sq = aligned.update(max_exp_avg_sqs[k]);
    tensor.span.size = params[k].numel() * type.per_element;
    tensor.step_count = static_cast<float*>(state_steps[k].mutable_data_ptr());
    lists.kinds.push_back(
        {type.dtype, kernels::AdamWState::like_param, kernels::AdamWRounding::nearest, amsgrad});
    lists.grads.push_back({aligned.read(grads[k]), tensor.span.size, type.dtype});
    lists.tensors.push_back(tensor);
  }
  AdamWGroup group{};
  group.lr = lr;
  group.beta1 = beta1;
  group.beta2 = beta2;
  group.eps = eps;
  group.weight_decay = weight_decay;
  group.sign = maximize ? -1 : 1;
  step(context, params[0], lists, group,
       grad_scale ? grad_scale->const_data_ptr<double>() : nullptr);
  for (Aligned& aligned : lists.aligned) aligned.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("_adamw_sum_of_squares", TORCH_BOX(&adamw_sum_of_squares));
}

}  // namespace torchweld::ops
