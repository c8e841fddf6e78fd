// The AdamW step on raw memory: what a kernel is given, and the table of kernels an instruction set
// provides.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace torchweld::kernels {

// One contiguous run of elements of a parameter and of its states, all of one storage type.
// max_exp_avg_sq is null unless amsgrad.
struct AdamWSpan {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;
  int64_t size;
};

// Scalars of a step, computed in double by the caller as torch's fused CPU step does and rounded to
// the arithmetic type by the kernel.
struct AdamWScalars {
  double decay;  // 1 - lr * weight_decay
  double beta1;
  double beta2;
  double step_size;  // lr / (1 - beta1^step)
  double bias_root;  // sqrt(1 - beta2^step)
  double eps;
  double grad_scale;  // factor on the gradient: clipping and 1 / loss scale; negative to maximize
};

// A tensor may be cut into spans at multiples of this many elements without changing a bit.
inline constexpr int64_t kAdamWSpanUnit = 16;

// Updates the span in place. Float32 and 16-bit storage computes in float, float64 in double; each
// value is rounded once, when stored. Touches nothing outside the span; spans may run in parallel.
using AdamWKernel = void (*)(const AdamWSpan& span, const AdamWScalars& scalars);

// Sum of squares of `size` elements, in double, in an order fixed by `size` alone.
using SumOfSquaresKernel = double (*)(const void* data, int64_t size);

struct AdamWKernels {
  AdamWKernel step[kDTypeCount];
  SumOfSquaresKernel sum_of_squares[kDTypeCount];
};

}  // namespace torchweld::kernels
