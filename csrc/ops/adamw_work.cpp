#include "ops/adamw_work.h"

#include "ops/check.h"
#include "ops/parallel.h"

namespace torchweld::ops {
namespace {

// Entries worth a thread of their own to look at.
constexpr int64_t kLooks = 64;

MemoryRange range_of(const Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  if (tensor.numel() == 0) return {begin, begin};
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// Brings tensors that do not lie alike to one layout.
void align(AdamWWork& work, const AdamWPlan& plan, const Tensor& grad) {
  AdamWEntry& entry = *work.entry;
  if (!entry.uniform || !same_layout(grad, plan.get(entry, kParam))) {
    // 8-bit states lie in the order their blocks were made in.
    const bool blocks = entry.state == kernels::AdamWState::int8;
    work.aligned = std::make_unique<Aligned>(plan.get(entry, blocks ? kExpAvg : kParam));
  }
  for (int role = 0; role < kRoleCount; ++role) {
    const Tensor* tensor = plan.find(entry, role);
    if (tensor == nullptr) continue;
    const bool align = work.aligned && has_shape_of_param(role);
    entry.data[role] = align ? work.aligned->update(*tensor) : tensor->mutable_data_ptr();
  }
  work.span.grad = work.aligned ? work.aligned->read(grad) : grad.const_data_ptr();
  work.fill();
  work.home = range_of(plan.get(entry, kParam));
}

void check_length(const char* op, const char* argument, const TensorList& list,
                  const TensorList& params) {
  TORCHWELD_CHECK(list.size() == params.size(), op, argument,
                  params.size() << " tensors, one per param", list.size());
}

}  // namespace

std::vector<AdamWHyper> groups_of(const char* op, const AdamWPlan& plan,
                                  const std::vector<double>& hyper, const TensorList& lrs) {
  constexpr size_t kValues = 6;
  std::vector<AdamWHyper> groups;
  for (size_t i = 0; i + kValues <= hyper.size(); i += kValues) {
    const double* v = &hyper[i];
    groups.push_back({v[0], v[1], v[2], v[3], v[4], v[5] != 0});
  }
  for (const AdamWEntry& entry : plan.entries) {
    TORCHWELD_CHECK(entry.group >= 0 && entry.group < static_cast<int64_t>(groups.size()), op,
                    "hyper", "values for each group", groups.size() << " groups");
  }
  TORCHWELD_CHECK(lrs.empty() || lrs.size() == groups.size(), op, "lrs",
                  "no tensor or " << groups.size() << ", one per group", lrs.size());
  for (size_t k = 0; k < lrs.size() && !plan.entries.empty(); ++k) {
    if (lrs[k].numel() == 0) continue;
    check_scalar(op, "lrs", lrs[k], plan.get(plan.entries[0], kParam));
    groups[k].lr_tensor = lrs[k];
  }
  return groups;
}

void check_scalars(const char* op, const AdamWPlan& plan, const std::optional<Tensor>& loss_scale,
                   const std::optional<Tensor>& sum_of_squares) {
  if (plan.entries.empty()) return;
  const Tensor& param = plan.get(plan.entries[0], kParam);
  if (loss_scale) check_scalar(op, "loss_scale", *loss_scale, param);
  if (sum_of_squares) {
    check_scalar(op, "sum_of_squares", *sum_of_squares, param, ScalarType::Double);
  }
}

void AdamWWork::fill() {
  const auto& data = entry->data;
  span = {.param = data[kParam],
          .grad = span.grad,
          .exp_avg = data[kExpAvg],
          .exp_avg_sq = data[kExpAvgSq],
          .max_exp_avg_sq = data[kMaxExpAvgSq],
          .compensation = data[kCompensation],
          .exp_avg_scale = static_cast<float*>(data[kExpAvgScale]),
          .exp_avg_sq_scale = static_cast<float*>(data[kExpAvgSqScale]),
          .size = entry->size,
          .index = 0};
  const auto* begin = static_cast<const char*>(span.param);
  home = {begin, begin + span.size * static_cast<int64_t>(size_of(dtype()))};
}

std::vector<AdamWWork> work_of(const char* op, AdamWPlan& plan,
                               const std::vector<AtenTensorHandle>& grads, const IntList& which) {
  const size_t count = which.empty() ? plan.entries.size() : which.size();
  TORCHWELD_CHECK(grads.size() == count, op, "grads", count << " tensors", grads.size());
  const auto place = [&](size_t k) { return which.empty() ? k : static_cast<size_t>(which[k]); };
  for (size_t k = 0; k < which.size(); ++k) {
    TORCHWELD_CHECK(place(k) < plan.entries.size() && (k == 0 || which[k] > which[k - 1]), op,
                    "which", "an entry of the plan, after the one before", place(k));
  }
  std::vector<AdamWWork> all(count);
  parallel_for(static_cast<int64_t>(count), kLooks, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      AdamWWork& work = all[static_cast<size_t>(k)];
      work.entry = &plan.entries[place(static_cast<size_t>(k))];
      work.uniform =
          still_uniform(plan, *work.entry, grads[static_cast<size_t>(k)], &work.span.grad);
      if (work.uniform) work.fill();
    }
  });
  for (size_t k = 0; k < count; ++k) {
    if (all[k].uniform) continue;
    AdamWEntry& entry = *all[k].entry;
    check(op, plan, entry, another_owner(grads[k]), place(k));
    const bool exists = kernels::adamw_exists(entry.type.dtype, entry.state, entry.rounding);
    entry.uniform = entry.uniform && exists;
    TORCHWELD_CHECK(exists, op, "params", "a dtype with kernels for these states and this rounding",
                    dtype_name(plan.get(entry, kParam).scalar_type()));
  }
  for (size_t k = 1; k < count; ++k) {
    const AdamWEntry &entry = *all[k].entry, &first = *all[0].entry;
    TORCHWELD_CHECK(
        entry.device_type == first.device_type && entry.device_index == first.device_index, op,
        "params", "tensors on one device", "another at " << place(k));
  }
  // What is copied into one layout is copied after all checks.
  for (size_t k = 0; k < count; ++k) {
    if (!all[k].uniform) align(all[k], plan, another_owner(grads[k]));
  }
  return all;
}

std::vector<AtenTensorHandle> plan_lists(const char* op, AdamWPlan& plan, const AdamWLists& lists,
                                         bool amsgrad, const std::optional<Tensor>& grad_scale) {
  const TensorList& params = lists.params;
  check_length(op, "grads", lists.grads, params);
  check_length(op, "exp_avgs", lists.exp_avgs, params);
  check_length(op, "exp_avg_sqs", lists.exp_avg_sqs, params);
  check_length(op, "state_steps", lists.state_steps, params);
  if (amsgrad) {
    check_length(op, "max_exp_avg_sqs", lists.max_exp_avg_sqs, params);
  } else {
    TORCHWELD_CHECK(lists.max_exp_avg_sqs.empty(), op, "max_exp_avg_sqs",
                    "an empty list without amsgrad", lists.max_exp_avg_sqs.size() << " tensors");
  }
  std::vector<AtenTensorHandle> grads;
  if (params.empty()) return grads;
  if (grad_scale) check_scalar(op, "grad_scale", *grad_scale, params[0], ScalarType::Double);
  for (size_t k = 0; k < params.size(); ++k) {
    AdamWEntry& entry = plan.entries.emplace_back();
    const auto place = [&](AdamWRole role, const Tensor& tensor) {
      entry.tensors[role] = static_cast<int64_t>(plan.tensors.size());
      plan.tensors.push_back(tensor);
    };
    place(kParam, params[k]);
    place(kStep, lists.state_steps[k]);
    place(kExpAvg, lists.exp_avgs[k]);
    place(kExpAvgSq, lists.exp_avg_sqs[k]);
    if (amsgrad) place(kMaxExpAvgSq, lists.max_exp_avg_sqs[k]);
    grads.push_back(lists.grads[k].get());
  }
  return grads;
}

}  // namespace torchweld::ops
