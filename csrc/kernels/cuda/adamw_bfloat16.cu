// The AdamW step with bfloat16 moments, stochastically rounded, as kernels/cpu/adamw_bfloat16.cpp.
#include "kernels/cuda/adamw_observe.h"

namespace torchweld::kernels::cuda {
namespace {

// Of an element in the whole parameter.
TORCHWELD_INLINE int64_t place_of(const AdamWTensor& tensor, int64_t i) {
  if (tensor.row != 0) i = i / tensor.row * tensor.stride + i % tensor.row;
  return tensor.span.index + i;
}

template <class T, AdamWRounding kRounding, bool kAmsgrad, bool kObserve>
__global__ void __launch_bounds__(kStepThreads) step_bfloat16(AdamWStepParams params) {
  constexpr int kCount = 8;
  const StepWork work(params);
  const AdamWSpan& span = work.tensor->span;
  const LowBitStep step(*work.scalars);
  const float beta1 = static_cast<float>(work.scalars->beta1);
  const float beta2 = static_cast<float>(work.scalars->beta2);
  const uint64_t key = work.scalars->key;
  Observation<T, kCount> seen(params, work);
  auto* const params_data = static_cast<T*>(span.param);
  auto* const m_data = static_cast<uint16_t*>(span.exp_avg);
  auto* const v_data = static_cast<uint16_t*>(span.exp_avg_sq);
  auto* const v_max_data = static_cast<uint16_t*>(span.max_exp_avg_sq);
  auto* const c_data = static_cast<uint16_t*>(span.compensation);
  for (int64_t i = work.begin + threadIdx.x * kCount; i < work.end; i += kStepThreads * kCount) {
    const int count = work.count<kCount>(i);
    T p[kCount], g[kCount];
    uint16_t m[kCount], v[kCount], v_max[kCount], c[kCount];
    load_group(params_data + i, count, p);
    load_group(static_cast<const T*>(work.grad) + i, count, g);
    load_group(m_data + i, count, m);
    load_group(v_data + i, count, v);
    if constexpr (kAmsgrad) load_group(v_max_data + i, count, v_max);
    if constexpr (kCompensated<kRounding>) load_group(c_data + i, count, c);
    if constexpr (kObserve) seen.begin(i, count);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float before = weight_of<kRounding>(p[j], c[j]);
      const RandomBits bits = random_at(place_of(*work.tensor, i + j), key);
      float mj = float_of(upper(m[j])) * beta1, vj = float_of(upper(v[j])) * beta2;
      step.moments(to_vec(g[j]), mj, vj);
      float second = vj;
      if constexpr (kAmsgrad) {
        second = larger(float_of(upper(v_max[j])), vj);
        v_max[j] = upper_half(round_nearest(second));
      }
      step_weight<kRounding>(step, p[j], c[j], mj, second, bits);
      m[j] = upper_half(round_stochastic(mj, bits.low16()));
      v[j] = upper_half(round_stochastic(vj, bits.high16()));
      if constexpr (kObserve) {
        seen.see(j, before, weight_of<kRounding>(p[j], c[j]), g[j], float_of(upper(m[j])) != 0);
      }
    }
    if constexpr (kObserve) seen.end();
    store_group(params_data + i, count, p);
    store_group(m_data + i, count, m);
    store_group(v_data + i, count, v);
    if constexpr (kAmsgrad) store_group(v_max_data + i, count, v_max);
    if constexpr (kCompensated<kRounding>) store_group(c_data + i, count, c);
  }
  if constexpr (kObserve) seen.write(params.statistics + blockIdx.x);
}

template <class T, AdamWRounding kRounding, bool kAmsgrad>
cudaError_t launch_observed(const AdamWStepParams& params, cudaStream_t stream) {
  return launch(params.statistics != nullptr ? step_bfloat16<T, kRounding, kAmsgrad, true>
                                             : step_bfloat16<T, kRounding, kAmsgrad, false>,
                params.count, kStepThreads, stream, params);
}

template <class T, AdamWRounding kRounding>
cudaError_t launch_for(bool amsgrad, const AdamWStepParams& params, cudaStream_t stream) {
  return (amsgrad ? launch_observed<T, kRounding, true>
                  : launch_observed<T, kRounding, false>)(params, stream);
}

}  // namespace

cudaError_t launch_bfloat16(const AdamWKind& kind, const AdamWStepParams& params,
                            cudaStream_t stream) {
  using enum AdamWRounding;
  switch (kind.param) {
    case DType::float32:
      return launch_for<float, nearest>(kind.amsgrad, params, stream);
    case DType::float16:
      return launch_for<Float16, nearest>(kind.amsgrad, params, stream);
    case DType::float64:
      return cudaErrorInvalidValue;
    case DType::bfloat16:
      break;
  }
  switch (kind.rounding) {
    case nearest:
      return launch_for<BFloat16, nearest>(kind.amsgrad, params, stream);
    case stochastic:
      return launch_for<BFloat16, stochastic>(kind.amsgrad, params, stream);
    case kahan:
      return launch_for<BFloat16, kahan>(kind.amsgrad, params, stream);
    case split:
      return launch_for<BFloat16, split>(kind.amsgrad, params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace torchweld::kernels::cuda
