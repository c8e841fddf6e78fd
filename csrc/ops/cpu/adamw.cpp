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
// of a few large tensors over the threads. A multiple of every register width, so that where a
// tensor is cut never changes a result.
constexpr int64_t kTaskSize = 1 << 15;

struct Task {
  AdamWSpan span;
  DType dtype;
  size_t tensor;
};

// Cuts n elements of tensors into tasks of at most kTaskSize: one flat list over all tensors, so
// that one parallel region serves a thousand biases as well as one embedding.
template <class F>
void for_each_chunk(const Tensor& tensor, const F& f) {
  for (int64_t begin = 0; begin < tensor.numel(); begin += kTaskSize) {
    f(begin, std::min(kTaskSize, tensor.numel() - begin));
  }
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
                    dtype_name(grad_scale->scalar_type()) << " of shape " << shape_string(*grad_scale));
    scale *= *grad_scale->const_data_ptr<double>();
  }

  std::vector<AdamWScalars> scalars;
  std::vector<Task> tasks;
  for (size_t k = 0; k < params.size(); ++k) {
    const double step = *state_steps[k].const_data_ptr<float>();
    scalars.push_back({.decay = 1 - lr * weight_decay,
                       .beta1 = beta1,
                       .beta2 = beta2,
                       .step_size = lr / (1 - std::pow(beta1, step)),
                       .bias_root = std::sqrt(1 - std::pow(beta2, step)),
                       .eps = eps,
                       .grad_scale = scale});
    const DType dtype = *to_dtype(params[k].scalar_type());
    const int64_t bytes = size_of(dtype);
    for_each_chunk(params[k], [&](int64_t begin, int64_t size) {
      const auto at = [&](const Tensor& t) {
        return static_cast<char*>(t.mutable_data_ptr()) + begin * bytes;
      };
      tasks.push_back({{.param = at(params[k]),
                        .grad = static_cast<const char*>(grads[k].const_data_ptr()) + begin * bytes,
                        .exp_avg = at(exp_avgs[k]),
                        .exp_avg_sq = at(exp_avg_sqs[k]),
                        .max_exp_avg_sq = amsgrad ? at(max_exp_avg_sqs[k]) : nullptr,
                        .size = size},
                       dtype,
                       k});
    });
  }

  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  parallel_for(tasks.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[i];
      kernels.step[static_cast<size_t>(task.dtype)](task.span, scalars[task.tensor]);
    }
  });
}

Tensor grad_norm(TensorList grads) {
  struct Chunk {
    const char* data;
    int64_t size;
    DType dtype;
  };
  std::vector<Chunk> chunks;
  for (size_t k = 0; k < grads.size(); ++k) {
    const auto dtype = to_dtype(grads[k].scalar_type());
    TORCHWELD_CHECK(dtype, "grad_norm", "grads", "float32, float64, bfloat16 or float16",
                    dtype_name(grads[k].scalar_type()));
    TORCHWELD_CHECK(is_dense(grads[k]), "grad_norm", "grads", "non-overlapping and dense memory",
                    "grads[" << k << "] with gaps");
    const char* data = static_cast<const char*>(grads[k].const_data_ptr());
    for_each_chunk(grads[k], [&](int64_t begin, int64_t size) {
      chunks.push_back({data + begin * static_cast<int64_t>(size_of(*dtype)), size, *dtype});
    });
  }

  const kernels::AdamWKernels& kernels = *cpu_kernels().adamw;
  std::vector<double> sums(chunks.size());
  parallel_for(chunks.size(), 1, [&](int64_t begin, int64_t end) {
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
