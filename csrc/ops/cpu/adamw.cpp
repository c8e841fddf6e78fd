#include "ops/adamw.h"

#include <algorithm>
#include <cmath>

#include "ops/check.h"
#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

using kernels::AdamWScalars;
using kernels::AdamWSpan;
using kernels::DType;

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;
// The unit of splitting: a multiple of a cache line in every dtype, and of kAdamWSpanUnit, so that
// where a tensor is cut never changes a bit.
constexpr int64_t kUnit = 64;
static_assert(kUnit % kernels::kAdamWSpanUnit == 0);
// Elements that make one partial sum of the norm: fixed, so that the sum is.
constexpr int64_t kSumSize = 1 << 14;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tensors of one parameter, brought to one dense layout. A tensor that is not in it already is
// worked on in a copy; write_back() copies the results home.
class Aligned {
 public:
  explicit Aligned(const Tensor& param)
      : layout_(is_dense(param) ? param : torch::stable::empty_like(param)) {}

  const char* read(const Tensor& tensor) {
    return static_cast<const char*>(align(tensor).const_data_ptr());
  }

  char* update(const Tensor& tensor) {
    const Tensor aligned = align(tensor);
    if (aligned.get() != tensor.get()) results_.emplace_back(tensor, aligned);
    return static_cast<char*>(aligned.mutable_data_ptr());
  }

  void write_back() {
    for (auto& [tensor, copy] : results_) torch::stable::copy_(tensor, copy);
  }

 private:
  Tensor align(const Tensor& tensor) {
    if (same_layout(tensor, layout_)) return tensor;
    Tensor& copy = copies_.emplace_back(torch::stable::empty_like(layout_));
    return torch::stable::copy_(copy, tensor);
  }

  Tensor layout_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> results_;
};

// A parameter in the flat list of units over all parameters.
struct Job {
  AdamWSpan span;
  DType dtype;
  size_t scalars;
  int64_t first_unit;
};

AdamWSpan part(const Job& job, int64_t unit, int64_t units) {
  const int64_t begin = unit * kUnit;
  return kernels::part(job.span, job.dtype, kernels::AdamWState::like_param,
                       kernels::AdamWRounding::nearest, begin,
                       std::min(units * kUnit, job.span.size - begin));
}

// All parameters in one parallel region, cut by elements and not by tensors: it serves a thousand
// biases as well as one embedding, and a small model stays on one thread.
void run(const std::vector<Job>& jobs, const std::vector<AdamWScalars>& scalars, int64_t units) {
  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  parallel_for(units, kGrain / kUnit, [&](int64_t begin, int64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t unit, const Job& j) { return unit < j.first_unit; }) -
               1;
    for (; begin < end; ++job) {
      const int64_t skipped = begin - job->first_unit;
      const int64_t count = std::min(ceil_div(job->span.size, kUnit) - skipped, end - begin);
      if (count > 0) {
        kernels.step(job->dtype)(part(*job, skipped, count), scalars[job->scalars]);
      }
      begin += count;
    }
  });
}

void adamw_step_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
                 TensorList max_exp_avg_sqs, TensorList state_steps, double lr, double beta1,
                 double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                 std::optional<Tensor> grad_scale) {
  check_adamw_step(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, state_steps, amsgrad);
  double scale = maximize ? -1.0 : 1.0;
  if (grad_scale) {
    TORCHWELD_CHECK(grad_scale->numel() == 1 && grad_scale->scalar_type() == ScalarType::Double,
                    "adamw_step_", "grad_scale", "a float64 scalar",
                    dtype_name(grad_scale->scalar_type())
                        << " of shape " << shape_string(*grad_scale));
    scale *= *grad_scale->const_data_ptr<double>();
  }

  NoGradGuard no_grad;
  std::vector<Aligned> aligned;
  std::vector<AdamWScalars> scalars;
  std::vector<Job> jobs;
  int64_t units = 0;
  double last_step = 0;
  for (size_t k = 0; k < params.size(); ++k) {
    const double step = *state_steps[k].const_data_ptr<float>() + 1;
    // Nearly always one and the same step for all.
    if (scalars.empty() || step != last_step) {
      scalars.push_back({.decay = 1 - lr * weight_decay,
                         .beta1 = beta1,
                         .beta2 = beta2,
                         .step_size = lr / (1 - std::pow(beta1, step)),
                         .bias_root = std::sqrt(1 - std::pow(beta2, step)),
                         .eps = eps,
                         .grad_scale = scale});
      last_step = step;
    }
    const RealType type = *real_type(params[k].scalar_type());
    Aligned& own = aligned.emplace_back(params[k]);
    const int64_t size = params[k].numel() * type.per_element;
    jobs.push_back({{.param = own.update(params[k]),
                     .grad = own.read(grads[k]),
                     .exp_avg = own.update(exp_avgs[k]),
                     .exp_avg_sq = own.update(exp_avg_sqs[k]),
                     .max_exp_avg_sq = amsgrad ? own.update(max_exp_avg_sqs[k]) : nullptr,
                     .compensation = nullptr,
                     .exp_avg_scale = nullptr,
                     .exp_avg_sq_scale = nullptr,
                     .size = size,
                     .index = 0},
                    type.dtype,
                    scalars.size() - 1,
                    units});
    units += ceil_div(size, kUnit);
  }
  run(jobs, scalars, units);
  for (Aligned& own : aligned) own.write_back();
  for (const Tensor& step : state_steps) *step.mutable_data_ptr<float>() += 1;
}

Tensor grad_norm(TensorList grads) {
  check_grad_norm(grads);
  struct Chunk {
    const char* data;
    int64_t size;
    DType dtype;
  };
  NoGradGuard no_grad;
  std::vector<Aligned> aligned;
  std::vector<Chunk> chunks;
  int64_t total_size = 0;
  for (const Tensor& grad : grads) {
    const RealType type = *real_type(grad.scalar_type());
    const char* data = aligned.emplace_back(grad).read(grad);
    const int64_t size = grad.numel() * type.per_element;
    for (int64_t begin = 0; begin < size; begin += kSumSize) {
      chunks.push_back({data + begin * static_cast<int64_t>(size_of(type.dtype)),
                        std::min(kSumSize, size - begin), type.dtype});
    }
    total_size += size;
  }

  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  const int64_t count = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(chunks.size());
  parallel_for(count, total_size < 2 * kGrain ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[i];
      sums[i] = kernels.sum_of_squares[static_cast<size_t>(chunk.dtype)](chunk.data, chunk.size);
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;

  Tensor norm = torch::stable::empty({}, ScalarType::Double);
  *norm.mutable_data_ptr<double>() = std::sqrt(total);
  return norm;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("adamw_step_", TORCH_BOX(&adamw_step_));
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
}

}  // namespace torchweld::ops
