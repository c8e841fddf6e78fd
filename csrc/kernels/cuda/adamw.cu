// The AdamW step with states like the parameters: torch's fused CPU step, bit for bit, as
// kernels/cpu/adamw.cpp has it.
#include "kernels/cuda/adamw_observe.h"

namespace torchweld::kernels::cuda {
namespace {

// Two blocks are asked for, and more fit: without a number ptxas saves registers by spilling one.
template <class T, bool kAmsgrad, bool kObserve>
__global__ void __launch_bounds__(kStepThreads, 2) step_like_param(AdamWStepParams params) {
  constexpr int kCount = 16 / sizeof(T);
  using Vec = typename Math<T>::Vec;
  const StepWork work(params);
  const AdamWSpan& span = work.tensor->span;
  const int64_t tail = span.size - span.size % kTorchLanes<T>;
  const Step<T> step(*work.scalars);
  Observation<T, kCount> seen(params, work);
  for (int64_t i = work.begin + threadIdx.x * kCount; i < work.end; i += kStepThreads * kCount) {
    const int count = work.count<kCount>(i);
    T p[kCount], g[kCount], m[kCount], v[kCount], v_max[kCount];
    load_group(static_cast<T*>(span.param) + i, count, p);
    load_group(static_cast<const T*>(work.grad) + i, count, g);
    load_group(static_cast<T*>(span.exp_avg) + i, count, m);
    load_group(static_cast<T*>(span.exp_avg_sq) + i, count, v);
    if constexpr (kAmsgrad) load_group(static_cast<T*>(span.max_exp_avg_sq) + i, count, v_max);
    if constexpr (kObserve) seen.begin(i, count);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Vec before = to_vec(p[j]);
      Vec pj = before, mj = to_vec(m[j]), vj = to_vec(v[j]);
      if constexpr (kAmsgrad) {
        Vec xj = to_vec(v_max[j]);
        step.update(pj, to_vec(g[j]), mj, vj, &xj, i + j >= tail);
        v_max[j] = from_vec<T>(xj);
      } else {
        step.update(pj, to_vec(g[j]), mj, vj, nullptr, i + j >= tail);
      }
      p[j] = from_vec<T>(pj);
      m[j] = from_vec<T>(mj);
      v[j] = from_vec<T>(vj);
      if constexpr (kObserve) seen.see(j, before, to_vec(p[j]), g[j], to_vec(m[j]) != 0);
    }
    if constexpr (kObserve) seen.end();
    store_group(static_cast<T*>(span.param) + i, count, p);
    store_group(static_cast<T*>(span.exp_avg) + i, count, m);
    store_group(static_cast<T*>(span.exp_avg_sq) + i, count, v);
    if constexpr (kAmsgrad) store_group(static_cast<T*>(span.max_exp_avg_sq) + i, count, v_max);
  }
  if constexpr (kObserve) seen.write(params.statistics + blockIdx.x);
}

template <class T, bool kAmsgrad>
cudaError_t launch_observed(const AdamWStepParams& params, cudaStream_t stream) {
  return launch(params.statistics != nullptr ? step_like_param<T, kAmsgrad, true>
                                             : step_like_param<T, kAmsgrad, false>,
                params.count, kStepThreads, stream, params);
}

template <class T>
cudaError_t launch_for(bool amsgrad, const AdamWStepParams& params, cudaStream_t stream) {
  return (amsgrad ? launch_observed<T, true> : launch_observed<T, false>)(params, stream);
}

}  // namespace

cudaError_t launch_like_param(const AdamWKind& kind, const AdamWStepParams& params,
                              cudaStream_t stream) {
  switch (kind.param) {
    case DType::float32:
      return launch_for<float>(kind.amsgrad, params, stream);
    case DType::float64:
      return launch_for<double>(kind.amsgrad, params, stream);
    case DType::bfloat16:
      return launch_for<BFloat16>(kind.amsgrad, params, stream);
    case DType::float16:
      return launch_for<Float16>(kind.amsgrad, params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_adamw_step(const AdamWKind& kind, const AdamWStepParams& params,
                              cudaStream_t stream) {
  const bool nearest = kind.rounding == AdamWRounding::nearest;
  if (!nearest && kind.param != DType::bfloat16) return cudaErrorInvalidValue;
  if (kind.state == AdamWState::int8) return launch_int8(kind, params, stream);
  const bool like_param = kind.state == AdamWState::like_param && nearest;
  return (like_param ? launch_like_param : launch_bfloat16)(kind, params, stream);
}

}  // namespace torchweld::kernels::cuda
