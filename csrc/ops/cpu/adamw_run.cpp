#include "ops/cpu/adamw_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "ops/cpu/adamw_pieces.h"
#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

using kernels::AdamWScalars;
using kernels::AdamWSpan;
using kernels::AdamWStatistics;
using kernels::DType;
using kernels::kAdamWSumPart;
using kernels::kAdamWSumPiece;

// Elements stepped at a time: few enough to lie in a core's first cache when they are looked at
// again, and a whole number of blocks of 8-bit states.
constexpr int64_t kPiece = 1 << 12;
static_assert(kPiece % kernels::kAdamWBlock == 0);

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

Values grad_of(const AdamWWork& work) { return {work.span.grad, work.dtype(), work.span.size}; }

// Of a piece: see kAdamWSumPiece.
double sum_piece(const Values& x, int64_t begin, int64_t size) {
  const auto sum = adamw_kernels().sum_of_squares[static_cast<size_t>(x.dtype)];
  double total = 0;
  for (int64_t at = 0; at < size; at += kAdamWSumPart) {
    total += sum(advance((const char*)x.data, bytes(x.dtype, begin + at)),
                 std::min(kAdamWSumPart, size - at));
  }
  return total;
}

double sum_values(const std::vector<Values>& tensors) {
  Pieces pieces(kAdamWSumPiece);
  for (const Values& x : tensors) pieces.add(x.size);
  std::vector<double> sums(static_cast<size_t>(pieces.count()));
  pieces.for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
    sums[static_cast<size_t>(piece)] = sum_piece(tensors[t], begin, size);
  });
  return kernels::adamw_total(sums.data(), pieces.count());
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

// f(part of the span, where it begins) for elements [begin, begin + size), each part's places in
// the whole parameter in sequence.
template <class F>
void for_parts(const AdamWWork& work, int64_t begin, int64_t size, const F& f) {
  const AdamWEntry& entry = *work.entry;
  const int64_t row = entry.row > 0 ? entry.row : begin + size;
  for (const int64_t end = begin + size; begin < end;) {
    const int64_t next = std::min(end, (begin / row + 1) * row);
    AdamWSpan part =
        kernels::part(work.span, work.dtype(), entry.state, entry.rounding, begin, next - begin);
    part.index = entry.offset + begin / row * entry.stride + begin % row;
    f(part, begin);
    begin = next;
  }
}

void run(const AdamWWork& work, int64_t begin, int64_t size, const AdamWScalars& scalars) {
  const auto step = adamw_kernels().step(work.dtype(), work.entry->state, work.entry->rounding);
  for_parts(work, begin, size, [&](const AdamWSpan& part, int64_t) { step(part, scalars); });
}

void run_observed(const AdamWWork& work, int64_t begin, int64_t size, const AdamWScalars& scalars,
                  double average_weight, AdamWStatistics* statistics) {
  const DType dtype = work.dtype();
  const auto step = adamw_kernels().step(dtype, work.entry->state, work.entry->rounding);
  const auto observe = adamw_kernels().observe(dtype, work.entry->state, work.entry->rounding);
  alignas(64) char param[kPiece * sizeof(double)];
  alignas(64) char compensation[kPiece * sizeof(int16_t)];
  for_parts(work, begin, size, [&](const AdamWSpan& part, int64_t at) {
    std::memcpy(param, part.param, static_cast<size_t>(bytes(dtype, part.size)));
    if (part.compensation != nullptr) {
      std::memcpy(compensation, part.compensation, static_cast<size_t>(part.size) * 2);
    }
    step(part, scalars);
    const int64_t average_size = std::max<int64_t>(4, bytes(dtype, 1));
    const kernels::AdamWObserver observer{
        .param_before = param,
        .compensation_before = part.compensation != nullptr ? compensation : nullptr,
        .ema = advance(work.average(), at * average_size),
        .ema_weight = average_weight,
        .bfloat16 = reinterpret_cast<kernels::BFloat16*>(advance(work.bfloat16_weight(), at * 2))};
    observe(part, scalars, observer, statistics);
  });
}

}  // namespace

AdamWRun::AdamWRun(const char* op, AdamWPlan& plan, const std::vector<AtenTensorHandle>& grads,
                   const IntList& which)
    : plan_(plan), work_(work_of(op, plan, grads, which)) {}

double AdamWRun::sum_of_squares() {
  std::vector<Values> grads;
  grads.reserve(work_.size());
  for (const AdamWWork& work : work_) grads.push_back(grad_of(work));
  return sum_values(grads);
}

int64_t AdamWRun::count_nonfinite() const {
  Pieces pieces(kAdamWSumPiece);
  for (const AdamWWork& work : work_) pieces.add(work.span.size);
  std::vector<int64_t> counts(static_cast<size_t>(pieces.count()));
  pieces.for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
    const Values grad = grad_of(work_[t]);
    const auto sum = adamw_kernels().sum_of_squares[static_cast<size_t>(grad.dtype)];
    if (std::isfinite(sum_piece(grad, begin, size))) return;
    const auto* element = advance((const char*)grad.data, bytes(grad.dtype, begin));
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
  for (const AdamWWork& work : work_) ranges.push_back(work.home);
  if (ranges == plan_.disjoint) return false;
  if (overlap(ranges)) return true;
  plan_.disjoint = std::move(ranges);
  return false;
}

double AdamWRun::share(int64_t count) const {
  int64_t total = 0;
  for (const AdamWWork& work : work_) total += work.span.size;
  return static_cast<double>(count) / static_cast<double>(std::max<int64_t>(total, 1));
}

AdamWStatistics AdamWRun::step(const std::vector<AdamWHyper>& groups, double grad_scale,
                               const AdamWOptions& options) {
  Pieces pieces(kPiece);
  bool observe = options.statistics;
  std::vector<float> steps;               // done before this one
  std::vector<AdamWScalars> all_scalars;  // one for each group and step, nearly always
  std::vector<size_t> places;             // of parameters, into these
  steps.reserve(work_.size());
  places.reserve(work_.size());
  for (size_t k = 0; k < work_.size(); ++k) {
    const AdamWWork& work = work_[k];
    const int64_t group = work.entry->group;
    steps.push_back(*work.step());
    const bool as_last = k > 0 && work_[k - 1].entry->group == group && steps[k - 1] == steps[k];
    if (!as_last) {
      all_scalars.push_back(
          scalars(groups[static_cast<size_t>(group)], steps[k] + 1.0, grad_scale));
    }
    places.push_back(all_scalars.size() - 1);
    pieces.add(work.span.size);
    observe = observe || work.is_observed();
  }
  const auto scalars_of = [&](size_t t) {
    AdamWScalars found = all_scalars[places[t]];
    found.key = kernels::adamw_key(options.seed, static_cast<uint64_t>(steps[t] + 1.0),
                                   static_cast<uint64_t>(work_[t].entry->id));
    return found;
  };

  // Stock steps one parameter after the other, and so does this where two share memory.
  const auto for_each = [&, one_by_one = shares_memory()](const auto& f) {
    if (!one_by_one) return pieces.for_each(f);
    for (size_t t = 0; t < work_.size(); ++t) {
      if (work_[t].aligned) work_[t].aligned->read_again();
      pieces.for_each_of(t, f);
      if (work_[t].aligned) work_[t].aligned->write_back();
    }
  };
  AdamWStatistics total{};
  if (observe) {
    std::vector<AdamWStatistics> partial(static_cast<size_t>(pieces.count()));
    for_each([&](size_t t, int64_t begin, int64_t size, int64_t piece) {
      run_observed(work_[t], begin, size, scalars_of(t), options.average_weight,
                   &partial[static_cast<size_t>(piece)]);
    });
    for (const AdamWStatistics& part : partial) {
      total.update_squares += part.update_squares;
      total.lost += part.lost;
      total.nonfinite += part.nonfinite;
    }
  } else {
    for_each([&](size_t t, int64_t begin, int64_t size, int64_t) {
      run(work_[t], begin, size, scalars_of(t));
    });
  }
  for (AdamWWork& work : work_) {
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
