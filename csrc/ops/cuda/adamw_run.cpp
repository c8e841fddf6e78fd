#include "ops/cuda/adamw_run.h"

#include "ops/check.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using kernels::AdamWScalars;
using kernels::AdamWStatistics;
using kernels::DType;
using kernels::kAdamWSumPiece;

AdamWKind kind_of(const AdamWWork& work) {
  return {work.dtype(), work.entry->state, work.entry->rounding,
          work.span.max_exp_avg_sq != nullptr};
}

AdamWGroup group_of(const AdamWHyper& hyper) {
  return {.lr = hyper.lr,
          .beta1 = hyper.beta1,
          .beta2 = hyper.beta2,
          .eps = hyper.eps,
          .weight_decay = hyper.weight_decay,
          .sign = hyper.maximize ? -1.0 : 1.0,
          .lr_data = hyper.lr_tensor ? hyper.lr_tensor->const_data_ptr() : nullptr,
          .lr_dtype = hyper.lr_tensor ? *to_dtype(hyper.lr_tensor->scalar_type()) : DType::float64};
}

AdamWTensor tensor_of(const AdamWWork& work) {
  const AdamWEntry& entry = *work.entry;
  AdamWTensor tensor{
      .span = work.span,
      .row = entry.row,
      .stride = entry.stride,
      .step_count = work.step(),
      .group = entry.group,
      .id = static_cast<uint64_t>(entry.id),
      .average = work.average(),
      .bfloat16_weight = reinterpret_cast<kernels::BFloat16*>(work.bfloat16_weight())};
  tensor.span.grad = nullptr;  // it comes and goes; the tables of gradients have it
  tensor.span.index = entry.offset;
  return tensor;
}

}  // namespace

void AdamWCudaTables::lay_out(const CudaContext& context, const std::vector<AdamWWork>& work) {
  elements_ = 0;
  for (const AdamWWork& w : work) elements_ += w.span.size;
  chunk_size_ = adamw_chunk_size(elements_, context.multiprocessors());
  ChunkRuns chunks(chunk_size_);
  batches_ = batches_of(key_.params, key_.sizes, key_.kinds, chunks);
  chunk_count_ = chunks.end();
  ChunkRuns pieces(kAdamWSumPiece, chunk_count_);  // one table behind the other
  for (size_t k = 0; k < work.size(); ++k) pieces.add(k, work[k].span.size);
  piece_count_ = pieces.end() - chunk_count_;
  runs_ = chunks.runs();
  runs_.insert(runs_.end(), pieces.runs().begin(), pieces.runs().end());

  const auto count = static_cast<int64_t>(work.size());
  memory_ = {};
  const auto bytes = [](size_t size, int64_t of) { return static_cast<int64_t>(size) * of; };
  const int64_t group_bytes = bytes(sizeof(AdamWGroup), static_cast<int64_t>(key_.groups));
  const int64_t grad_bytes = bytes(sizeof(Values), count);
  const int64_t tensor_bytes = bytes(sizeof(AdamWTensor), count);
  const int64_t run_bytes = bytes(sizeof(ChunkRun), static_cast<int64_t>(runs_.size()));
  groups_ = memory_.reserve<char>(group_bytes + grad_bytes + tensor_bytes + run_bytes);
  grads_ = groups_ + group_bytes;
  tensors_ = grads_ + grad_bytes;
  runs_at_ = tensors_ + tensor_bytes;
  chunks_ = memory_.reserve<Chunk>(chunk_count_ + piece_count_);
  scalars_ = memory_.reserve<AdamWScalars>(count);
  squares_ = memory_.reserve<double>(piece_count_);
  nonfinite_ = memory_.reserve<int64_t>(piece_count_);
  skipped_ = memory_.reserve<int64_t>(1);
  memory_.allocate(device_);
}

void AdamWCudaTables::update(const CudaContext& context, const std::vector<AdamWHyper>& groups,
                             const std::vector<AdamWWork>& work) {
  Key key{context.stream(), context.capture(), groups.size(), {}, {}, {}};
  std::vector<AdamWGroup> group_table;
  std::vector<Values> grads;
  std::vector<AdamWTensor> tensors;
  for (const AdamWHyper& hyper : groups) group_table.push_back(group_of(hyper));
  for (const AdamWWork& w : work) {
    key.kinds.push_back(kind_of(w));
    key.params.push_back(w.home);
    key.sizes.push_back(w.span.size);
    grads.push_back({w.span.grad, w.span.size, w.dtype()});
    tensors.push_back(tensor_of(w));
  }
  const bool anew = words_.empty() || !(key == key_);
  if (anew) {
    key_ = std::move(key);
    words_.clear();
    lay_out(context, work);
  }
  Words words;
  append(words, group_table);
  append(words, grads);
  append(words, tensors);
  append(words, runs_);
  const auto [first, last] = changed(words_, words);
  words_.clear();  // unknown if a launch fails
  context.check(launch_write(memory_.at<uint64_t>(groups_) + first, words.data() + first,
                             static_cast<int64_t>((last - first) * sizeof(uint64_t)),
                             context.stream()));
  if (anew) {
    context.check(launch_chunks(memory_.at<ChunkRun>(runs_at_), static_cast<int64_t>(runs_.size()),
                                memory_.at<Chunk>(chunks_), context.stream()));
  }
  words_ = std::move(words);
}

Tensor AdamWCudaTables::step(const CudaContext& context, const AdamWCudaOptions& options,
                             bool observe, std::vector<AdamWWork>& work) const {
  const cudaStream_t stream = context.stream();
  const Values* grads = memory_.at<Values>(grads_);
  const bool has_norm =
      options.loss_scale || options.skip_nonfinite || options.max_grad_norm || options.statistics;
  // Where the sum comes from elsewhere, all there is to count is for the statistics.
  const bool sums = has_norm && (!options.sum_of_squares || options.statistics);
  if (sums) {
    context.check(launch_sum_of_squares({.tensors = grads,
                                         .pieces = memory_.at<Chunk>(chunks_) + chunk_count_,
                                         .count = piece_count_,
                                         .squares = memory_.at<double>(squares_),
                                         .nonfinite = memory_.at<int64_t>(nonfinite_)},
                                        stream));
  }
  const Tensor report = torch::stable::new_empty(device_, IntList{5}, ScalarType::Double);
  AdamWPrepareParams prepare{};
  prepare.squares = sums ? memory_.at<double>(squares_) : nullptr;
  prepare.nonfinite = memory_.at<int64_t>(nonfinite_);
  prepare.pieces = sums ? piece_count_ : 0;
  if (has_norm && options.sum_of_squares) {
    prepare.sum_of_squares = options.sum_of_squares->const_data_ptr<double>();
  }
  if (options.loss_scale) {
    prepare.loss_scale = options.loss_scale->const_data_ptr();
    prepare.loss_scale_dtype = *to_dtype(options.loss_scale->scalar_type());
  }
  prepare.grad_scale = options.grad_scale;
  prepare.max_grad_norm = options.max_grad_norm.value_or(-1);
  prepare.skip_nonfinite = options.skip_nonfinite;
  prepare.tensors = memory_.at<AdamWTensor>(tensors_);
  prepare.count = static_cast<int64_t>(key_.kinds.size());
  prepare.groups = memory_.at<AdamWGroup>(groups_);
  prepare.seed = options.seed;
  prepare.scalars = memory_.at<AdamWScalars>(scalars_);
  prepare.skipped = memory_.at<int32_t>(skipped_);
  prepare.report = static_cast<double*>(report.mutable_data_ptr());
  context.check(launch_adamw_prepare(prepare, stream));

  CudaScratch seen;
  const int64_t seen_at = seen.reserve<AdamWStatistics>(observe ? chunk_count_ : 0);
  if (observe) seen.allocate(device_);
  AdamWStatistics* const statistics = observe ? seen.at<AdamWStatistics>(seen_at) : nullptr;
  for (const AdamWBatch& batch : batches_) {
    Aligned* const aligned = batch.tensor ? work[*batch.tensor].aligned.get() : nullptr;
    if (aligned) aligned->read_again();
    context.check(launch_adamw_step(batch.kind,
                                    {.tensors = prepare.tensors,
                                     .grads = grads,
                                     .scalars = prepare.scalars,
                                     .skipped = prepare.skipped,
                                     .chunks = memory_.at<Chunk>(chunks_) + batch.first,
                                     .count = batch.count,
                                     .chunk_size = chunk_size_,
                                     .statistics = observe ? statistics + batch.first : nullptr,
                                     .average_weight = options.average_weight},
                                    stream));
    if (aligned) aligned->write_back();
  }
  if (observe) {
    context.check(launch_adamw_report({.statistics = statistics,
                                       .count = chunk_count_,
                                       .elements = elements_,
                                       .skipped = prepare.skipped,
                                       .report = prepare.report},
                                      stream));
  }
  return report;
}

Tensor adamw_run_on_cuda(const char* op, AdamWPlan& plan,
                         const std::vector<AtenTensorHandle>& grads, const IntList& which,
                         const std::vector<AdamWHyper>& groups, const AdamWCudaOptions& options) {
  TORCHWELD_CHECK(!plan.entries.empty(), op, "params", "a tensor", "none");
  const size_t first = which.empty() ? 0 : static_cast<size_t>(which[0]);
  const AdamWEntry& entry = plan.entries[first < plan.entries.size() ? first : 0];
  const Tensor& param = plan.get(entry, kParam);
  NoGradGuard no_grad;
  const CudaContext context(op, param);
  std::vector<AdamWWork> work = work_of(op, plan, grads, which);
  bool observe = options.statistics;
  for (const AdamWWork& w : work) observe = observe || w.is_observed();
  if (plan.tables == nullptr) plan.tables = std::make_unique<AdamWCudaTables>(param);
  auto& tables = static_cast<AdamWCudaTables&>(*plan.tables);
  tables.update(context, groups, work);
  Tensor report = tables.step(context, options, observe, work);
  for (AdamWWork& w : work) {
    if (w.aligned) w.aligned->write_back();
  }
  return report;
}

}  // namespace torchweld::ops
