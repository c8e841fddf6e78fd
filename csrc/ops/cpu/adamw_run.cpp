#include "ops/cpu/adamw_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "ops/adamw_aligned.h"
#include "ops/check.h"
#include "ops/cpu/adamw_pieces.h"
#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

using kernels::AdamWScalars;
using kernels::AdamWSpan;
using kernels::AdamWStatistics;
using kernels::DType;

// Elements stepped at a time: few enough to lie in a core's first cache when they are looked at
// again, and a whole number of blocks of 8-bit states.
constexpr int64_t kPiece = 1 << 12;
static_assert(kPiece % kernels::kAdamWBlock == 0);
// Elements that make one partial sum of a norm: fixed, so that the sum is.
constexpr int64_t kSumPiece = 1 << 14;
// Entries worth a thread of their own to look at.
constexpr int64_t kLooks = 64;

const kernels::AdamWKernels& adamw_kernels() { return *cpu_kernels().adamw; }

template <class T>
T* advance(T* data, int64_t bytes) {
  return data == nullptr ? nullptr : reinterpret_cast<T*>((char*)data + bytes);
}

int64_t bytes(DType dtype, int64_t size) { return size * static_cast<int64_t>(size_of(dtype)); }

struct Values {
  const void* data;
  DType dtype;
  int64_t size;
};

double sum_values(const std::vector<Values>& tensors) {
  Pieces pieces(kSumPiece);
  for (const Values& x : tensors) pieces.add(x.size);
  std::vector<double> sums(static_cast<size_t>(pieces.count()));
  pieces.for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
    const Values& x = tensors[t];
    sums[static_cast<size_t>(piece)] = adamw_kernels().sum_of_squares[static_cast<size_t>(x.dtype)](
        advance((const char*)x.data, bytes(x.dtype, begin)), size);
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

AdamWScalars scalars(const AdamWHyper& hyper, double step, double grad_scale) {
  return {.decay = 1 - hyper.lr * hyper.weight_decay,
          .beta1 = hyper.beta1,
          .beta2 = hyper.beta2,
          .step_size = hyper.lr / (1 - std::pow(hyper.beta1, step)),
          .bias_root = std::sqrt(1 - std::pow(hyper.beta2, step)),
          .eps = hyper.eps,
          .grad_scale = hyper.maximize ? -grad_scale : grad_scale};
}

}  // namespace

struct AdamWRun::Work {
  AdamWEntry* entry;
  bool uniform;                      // as before
  float step_count;                  // before this step
  size_t scalars;                    // into those of the step
  std::unique_ptr<Aligned> aligned;  // where tensors do not lie alike
  AdamWSpan span;

  DType dtype() const { return entry->type.dtype; }
  float* step() const { return static_cast<float*>(entry->data[kStep]); }
  char* average() const { return static_cast<char*>(entry->data[kAverage]); }
  char* bfloat16_weight() const { return static_cast<char*>(entry->data[kBFloat16Weight]); }

  // All but span.grad, which is there.
  void fill() {
    const auto& data = entry->data;
    step_count = *step();
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
  }

  Values grad() const { return {span.grad, dtype(), span.size}; }

  // f(part of the span) for elements [begin, begin + size), each part's places in the whole
  // parameter in sequence.
  template <class F>
  void for_parts(int64_t begin, int64_t size, const F& f) const {
    const int64_t row = entry->row > 0 ? entry->row : begin + size;
    for (const int64_t end = begin + size; begin < end;) {
      const int64_t next = std::min(end, (begin / row + 1) * row);
      AdamWSpan part =
          kernels::part(span, dtype(), entry->state, entry->rounding, begin, next - begin);
      part.index = entry->offset + begin / row * entry->stride + begin % row;
      f(part, begin);
      begin = next;
    }
  }

  void run(int64_t begin, int64_t size, const AdamWScalars& scalars) const {
    const auto step = adamw_kernels().step(dtype(), entry->state, entry->rounding);
    for_parts(begin, size, [&](const AdamWSpan& part, int64_t) { step(part, scalars); });
  }

  void run_observed(int64_t begin, int64_t size, const AdamWScalars& scalars, double average_weight,
                    AdamWStatistics* statistics) const {
    const auto step = adamw_kernels().step(dtype(), entry->state, entry->rounding);
    const auto observe = adamw_kernels().observe(dtype(), entry->state, entry->rounding);
    alignas(64) char param[kPiece * sizeof(double)];
    alignas(64) char compensation[kPiece * sizeof(int16_t)];
    for_parts(begin, size, [&](const AdamWSpan& part, int64_t at) {
      std::memcpy(param, part.param, static_cast<size_t>(bytes(dtype(), part.size)));
      if (part.compensation != nullptr) {
        std::memcpy(compensation, part.compensation, static_cast<size_t>(part.size) * 2);
      }
      step(part, scalars);
      const int64_t average_size = std::max<int64_t>(4, bytes(dtype(), 1));
      const kernels::AdamWObserver observer{
          .param_before = param,
          .compensation_before = part.compensation != nullptr ? compensation : nullptr,
          .ema = advance(average(), at * average_size),
          .ema_weight = average_weight,
          .bfloat16 = reinterpret_cast<kernels::BFloat16*>(advance(bfloat16_weight(), at * 2))};
      observe(part, scalars, observer, statistics);
    });
  }
};

AdamWRun::AdamWRun(const char* op, AdamWPlan& plan, const std::vector<AtenTensorHandle>& grads,
                   const IntList& which)
    : plan_(plan) {
  const size_t count = which.empty() ? plan.entries.size() : which.size();
  TORCHWELD_CHECK(grads.size() == count, op, "grads", count << " tensors", grads.size());
  const auto place = [&](size_t k) { return which.empty() ? k : static_cast<size_t>(which[k]); };
  for (size_t k = 0; k < which.size(); ++k) {
    TORCHWELD_CHECK(place(k) < plan.entries.size() && (k == 0 || which[k] > which[k - 1]), op,
                    "which", "an entry of the plan, after the one before", place(k));
  }
  work_.resize(count);
  const auto entry_of = [&](int64_t k) -> AdamWEntry& { return plan.entries[place(k)]; };
  parallel_for(static_cast<int64_t>(count), kLooks, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Work& work = work_[k];
      work.entry = &entry_of(k);
      work.uniform = still_uniform(plan, *work.entry, grads[k], &work.span.grad);
      if (work.uniform) work.fill();
    }
  });
  for (size_t k = 0; k < count; ++k) {
    if (work_[k].uniform) continue;
    AdamWEntry& entry = *work_[k].entry;
    check(op, plan, entry, another_owner(grads[k]), place(k));
    const auto step = adamw_kernels().step(entry.type.dtype, entry.state, entry.rounding);
    entry.uniform = entry.uniform && step != nullptr;
    TORCHWELD_CHECK(step != nullptr, op, "params",
                    "a dtype with kernels for these states and this rounding",
                    dtype_name(plan.get(entry, kParam).scalar_type()));
  }
  // What is copied into one layout is copied after all checks.
  for (size_t k = 0; k < count; ++k) {
    if (!work_[k].uniform) align(work_[k], another_owner(grads[k]));
  }
}

AdamWRun::~AdamWRun() = default;

void AdamWRun::align(Work& work, const Tensor& grad) {
  AdamWEntry& entry = *work.entry;
  if (!entry.uniform || !same_layout(grad, plan_.get(entry, kParam))) {
    // 8-bit states lie in the order their blocks were made in.
    const bool blocks = entry.state == kernels::AdamWState::int8;
    work.aligned = std::make_unique<Aligned>(plan_.get(entry, blocks ? kExpAvg : kParam));
  }
  for (int role = 0; role < kRoleCount; ++role) {
    const Tensor* tensor = plan_.find(entry, role);
    if (tensor == nullptr) continue;
    const bool align = work.aligned && has_shape_of_param(role);
    entry.data[role] = align ? work.aligned->update(*tensor) : tensor->mutable_data_ptr();
  }
  work.span.grad = work.aligned ? work.aligned->read(grad) : grad.const_data_ptr();
  work.fill();
}

double AdamWRun::sum_of_squares() {
  std::vector<Values> grads;
  grads.reserve(work_.size());
  for (const Work& work : work_) grads.push_back(work.grad());
  return sum_values(grads);
}

int64_t AdamWRun::count_nonfinite() const {
  Pieces pieces(kSumPiece);
  for (const Work& work : work_) pieces.add(work.span.size);
  std::vector<int64_t> counts(static_cast<size_t>(pieces.count()));
  pieces.for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
    const Values grad = work_[t].grad();
    const auto sum = adamw_kernels().sum_of_squares[static_cast<size_t>(grad.dtype)];
    const auto* element = advance((const char*)grad.data, bytes(grad.dtype, begin));
    if (std::isfinite(sum(element, size))) return;
    for (int64_t i = 0; i < size; ++i, element += size_of(grad.dtype)) {
      double value;
      if (grad.dtype == DType::float64) {
        std::memcpy(&value, element, sizeof value);  // its square may overflow
      } else {
        value = sum(element, 1);
      }
      counts[static_cast<size_t>(piece)] += !std::isfinite(value);
    }
  });
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

bool AdamWRun::shares_memory() {
  std::vector<MemoryRange> ranges;
  ranges.reserve(work_.size());
  for (const Work& work : work_) {
    const auto* begin = static_cast<const char*>(work.span.param);
    ranges.emplace_back(begin, begin + bytes(work.dtype(), work.span.size));
  }
  if (ranges == plan_.disjoint) return false;
  if (overlap(ranges)) return true;
  plan_.disjoint = std::move(ranges);
  return false;
}

double AdamWRun::share(int64_t count) const {
  int64_t total = 0;
  for (const Work& work : work_) total += work.span.size;
  return static_cast<double>(count) / static_cast<double>(std::max<int64_t>(total, 1));
}

AdamWStatistics AdamWRun::step(const std::vector<AdamWHyper>& groups, double grad_scale,
                               const AdamWOptions& options) {
  Pieces pieces(kPiece);
  bool observe = options.statistics;
  std::vector<AdamWScalars> all_scalars;  // one for each group and step, nearly always
  for (size_t k = 0; k < work_.size(); ++k) {
    Work& work = work_[k];
    const int64_t group = work.entry->group;
    const bool as_last =
        k > 0 && work_[k - 1].entry->group == group && work_[k - 1].step_count == work.step_count;
    if (!as_last) {
      all_scalars.push_back(
          scalars(groups[static_cast<size_t>(group)], work.step_count + 1.0, grad_scale));
    }
    work.scalars = all_scalars.size() - 1;
    pieces.add(work.span.size);
    observe = observe || work.average() || work.bfloat16_weight();
  }
  const auto scalars_of = [&](const Work& work) {
    AdamWScalars found = all_scalars[work.scalars];
    found.key = kernels::adamw_key(options.seed, static_cast<uint64_t>(work.step_count + 1.0),
                                   static_cast<uint64_t>(work.entry->id));
    return found;
  };

  // Stock steps one parameter after the other, and so does this where two are the same memory.
  const auto for_each = [&, in_order = shares_memory()](const auto& f) {
    in_order ? pieces.for_each_in_order(f) : pieces.for_each(f);
  };
  AdamWStatistics total{};
  if (observe) {
    std::vector<AdamWStatistics> partial(static_cast<size_t>(pieces.count()));
    for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
      work_[t].run_observed(begin, size, scalars_of(work_[t]), options.average_weight,
                            &partial[static_cast<size_t>(piece)]);
    });
    for (const AdamWStatistics& part : partial) {
      total.update_squares += part.update_squares;
      total.lost += part.lost;
      total.nonfinite += part.nonfinite;
    }
  } else {
    for_each([&](size_t t, int64_t begin, int64_t size, int64_t) {
      work_[t].run(begin, size, scalars_of(work_[t]));
    });
  }
  for (Work& work : work_) {
    if (work.aligned) work.aligned->write_back();
    *work.step() += 1;
  }
  return total;
}

double sum_of_squares(const TensorList& tensors) {
  std::vector<Aligned> aligned;
  std::vector<Values> values;
  aligned.reserve(tensors.size());
  values.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    const RealType type = *real_type(tensor.scalar_type());
    values.push_back(
        {aligned.emplace_back(tensor).read(tensor), type.dtype, tensor.numel() * type.per_element});
  }
  return sum_values(values);
}

}  // namespace torchweld::ops
