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

// Elements a task updates: large enough to hide the cost of a task, small enough to spread a model
// of a few large tensors over the threads.
constexpr int64_t kTaskSize = 1 << 15;
static_assert(kTaskSize % kernels::kAdamWSpanUnit == 0);

// f(begin, size) over the elements of a tensor, at most kTaskSize at a time: all tensors end in one
// flat list, so that one parallel region serves a thousand biases as well as one embedding.
template <class F>
void for_each_chunk(int64_t numel, const F& f) {
  for (int64_t begin = 0; begin < numel; begin += kTaskSize) {
    f(begin, std::min(kTaskSize, numel - begin));
  }
}

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

struct Task {
  AdamWSpan span;
  DType dtype;
  size_t scalars;
};

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
  std::vector<Task> tasks;
  double last_step = 0;
  for (size_t k = 0; k < params.size(); ++k) {
    const double step = *state_steps[k].mutable_data_ptr<float>() += 1;
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
    const int64_t bytes = static_cast<int64_t>(size_of(type.dtype));
    Aligned& own = aligned.emplace_back(params[k]);
    char* const p = own.update(params[k]);
    const char* const g = own.read(grads[k]);
    char* const m = own.update(exp_avgs[k]);
    char* const v = own.update(exp_avg_sqs[k]);
    char* const v_max = amsgrad ? own.update(max_exp_avg_sqs[k]) : nullptr;
    for_each_chunk(params[k].numel() * type.per_element, [&](int64_t begin, int64_t size) {
      const int64_t at = begin * bytes;
      tasks.push_back({{p + at, g + at, m + at, v + at, amsgrad ? v_max + at : nullptr, size},
                       type.dtype,
                       scalars.size() - 1});
    });
  }

  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  parallel_for(static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      kernels.step[static_cast<size_t>(task.dtype)](task.span, scalars[task.scalars]);
    }
  });
  for (Aligned& own : aligned) own.write_back();
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
  for (const Tensor& grad : grads) {
    const RealType type = *real_type(grad.scalar_type());
    const char* data = aligned.emplace_back(grad).read(grad);
    for_each_chunk(grad.numel() * type.per_element, [&](int64_t begin, int64_t size) {
      const int64_t at = begin * static_cast<int64_t>(size_of(type.dtype));
      chunks.push_back({data + at, size, type.dtype});
    });
  }

  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  std::vector<double> sums(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
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
