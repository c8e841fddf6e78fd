// The AdamW step with int8 moments, in one pass, as kernels/cpu/adamw_int8.cpp, and their
// conversion from and to float.
#include "kernels/cuda/adamw_observe.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kCount = 16;  // elements of a thread: a word of codes
constexpr int kLanes = static_cast<int>(kAdamWBlock) / kCount;  // threads of a block of codes
static_assert(kLanes == 16, "a mask below is of half a warp");
// Half of what other kinds have: with as many elements in flight, and chunks that are as small.
constexpr int kThreads = kStepThreads / 2;
static_assert(kThreads * kCount <= kAdamWLeastChunk);

// The threads of this one's block of codes. Halves of a warp may be in different turns of a loop.
TORCHWELD_INLINE unsigned half_warp() { return 0xffffu << (threadIdx.x & 16); }

TORCHWELD_INLINE int32_t magnitude_bits(float x) {
  return static_cast<int32_t>(bits_of(x) & 0x7fffffffu);
}

TORCHWELD_INLINE float decode(ExpAvgCodec, uint8_t code, float unit) {
  return ExpAvgCodec::decode(static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(code))),
                             unit);
}
TORCHWELD_INLINE float decode(ExpAvgSqCodec, uint8_t code, float unit) {
  return ExpAvgSqCodec::decode(code, unit);
}

// The largest magnitude among the gradients of the kLanes threads of a block, of float bits: in
// their order NaN is above infinity.
template <class T>
TORCHWELD_INLINE float peak_of(const T (&g)[kCount]) {
  int32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const int32_t other = magnitude_bits(to_vec(g[j]));
    bits = other > bits ? other : bits;
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const int32_t other = __shfl_xor_sync(half_warp(), bits, step);
    bits = other > bits ? other : bits;
  }
  return float_of(static_cast<uint32_t>(bits));
}

template <class T, AdamWRounding kRounding, bool kObserve>
__global__ void __launch_bounds__(kThreads) step_int8(AdamWStepParams params) {
  const StepWork work(params);
  const AdamWSpan& span = work.tensor->span;
  const LowBitStep step(*work.scalars);
  const ScaleStep scale_step(*work.scalars);
  const uint64_t key = work.scalars->key;
  Observation<T, kCount> seen(params, work);
  auto* const params_data = static_cast<T*>(span.param);
  auto* const m_data = static_cast<uint8_t*>(span.exp_avg);
  auto* const v_data = static_cast<uint8_t*>(span.exp_avg_sq);
  auto* const c_data = static_cast<uint16_t*>(span.compensation);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  // All threads of a block of codes take a turn or none, also those whose elements are past the
  // end.
  for (int64_t first = work.begin + threadIdx.x / kLanes * kAdamWBlock; first < work.end;
       first += kThreads * kCount) {
    const int64_t i = first + lane * kCount;
    const int count = i < work.end ? work.count<kCount>(i) : 0;
    T p[kCount], g[kCount];
    uint8_t m[kCount], v[kCount];
    uint16_t c[kCount];
    load_group(static_cast<const T*>(work.grad) + i, count, g);
    load_group(params_data + i, count, p);
    load_group(m_data + i, count, m);
    load_group(v_data + i, count, v);
    if constexpr (kCompensated<kRounding>) load_group(c_data + i, count, c);
    float* const m_scale = span.exp_avg_scale + first / kAdamWBlock;
    float* const v_scale = span.exp_avg_sq_scale + first / kAdamWBlock;
    const float m_old = *m_scale, v_old = *v_scale;
    const BlockScales scales = scale_step.update(m_old, v_old, peak_of(g));
    if constexpr (kObserve) seen.begin(i, count);
    __syncwarp(half_warp());  // all have read the old ones
    if (lane == 0) {
      *m_scale = scales.m;
      *v_scale = scales.v;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float before = weight_of<kRounding>(p[j], c[j]);
      const RandomBits bits = random_at(span.index + i + j, key);
      float mj = decode(ExpAvgCodec{}, m[j], scales.m_decode);
      float vj = decode(ExpAvgSqCodec{}, v[j], scales.v_decode);
      step.moments(to_vec(g[j]), mj, vj);
      step_weight<kRounding>(step, p[j], c[j], mj, vj, bits);
      m[j] = static_cast<uint8_t>(ExpAvgCodec::encode(mj, scales.m_encode, bits.low20()));
      v[j] = static_cast<uint8_t>(
          ExpAvgSqCodec::encode(vj, scales.v_encode, bits.high20(), scales.v_least));
      if constexpr (kObserve) {
        seen.see(j, before, weight_of<kRounding>(p[j], c[j]), g[j], (m[j] & 0x7f) != 0);
      }
    }
    if constexpr (kObserve) seen.end();
    store_group(params_data + i, count, p);
    store_group(m_data + i, count, m);
    store_group(v_data + i, count, v);
    if constexpr (kCompensated<kRounding>) store_group(c_data + i, count, c);
  }
  if constexpr (kObserve) seen.write(params.statistics + blockIdx.x);
}

template <class T, AdamWRounding kRounding>
cudaError_t launch_for(const AdamWStepParams& params, cudaStream_t stream) {
  return launch(
      params.statistics != nullptr ? step_int8<T, kRounding, true> : step_int8<T, kRounding, false>,
      params.count, kThreads, stream, params);
}

// One block of threads a block of codes.
template <class Codec>
__global__ void encode(AdamWCodeParams params) {
  __shared__ int32_t peak;
  const int64_t i = blockIdx.x * kAdamWBlock + threadIdx.x;
  const float x = i < params.size ? params.values[i] : 0.0f;
  if (threadIdx.x == 0) peak = 0;
  __syncthreads();
  atomicMax(&peak, magnitude_bits(x));
  __syncthreads();
  const float scale = float_of(static_cast<uint32_t>(peak));
  if (threadIdx.x == 0) params.scales[blockIdx.x] = scale;
  const float inverse = Codec::kRange / at_least(scale, Codec::kLeastScale);
  uint32_t code;
  if constexpr (__is_same(Codec, ExpAvgCodec)) {
    code = ExpAvgCodec::encode(x, inverse, kRoundNearest);
  } else {
    code = ExpAvgSqCodec::encode(x, inverse, kRoundNearest, x != 0 ? kCodeOne : kCodeZero);
  }
  if (i < params.size) params.codes[i] = static_cast<uint8_t>(code);
}

template <class Codec>
__global__ void decode_codes(AdamWCodeParams params) {
  const int64_t i = blockIdx.x * kAdamWBlock + threadIdx.x;
  if (i >= params.size) return;
  params.values[i] = decode(Codec{}, params.codes[i], params.scales[blockIdx.x] / Codec::kRange);
}

int64_t blocks_of(const AdamWCodeParams& params) {
  return (params.size + kAdamWBlock - 1) / kAdamWBlock;
}

}  // namespace

cudaError_t launch_int8(const AdamWKind& kind, const AdamWStepParams& params, cudaStream_t stream) {
  using enum AdamWRounding;
  if (kind.amsgrad) return cudaErrorInvalidValue;
  switch (kind.param) {
    case DType::float32:
      return launch_for<float, nearest>(params, stream);
    case DType::float16:
      return launch_for<Float16, nearest>(params, stream);
    case DType::float64:
      return cudaErrorInvalidValue;
    case DType::bfloat16:
      break;
  }
  switch (kind.rounding) {
    case nearest:
      return launch_for<BFloat16, nearest>(params, stream);
    case stochastic:
      return launch_for<BFloat16, stochastic>(params, stream);
    case kahan:
      return launch_for<BFloat16, kahan>(params, stream);
    case split:
      return launch_for<BFloat16, split>(params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_adamw_encode(const AdamWCodeParams& params, cudaStream_t stream) {
  return launch(params.is_signed ? encode<ExpAvgCodec> : encode<ExpAvgSqCodec>, blocks_of(params),
                static_cast<int>(kAdamWBlock), stream, params);
}

cudaError_t launch_adamw_decode(const AdamWCodeParams& params, cudaStream_t stream) {
  return launch(params.is_signed ? decode_codes<ExpAvgCodec> : decode_codes<ExpAvgSqCodec>,
                blocks_of(params), static_cast<int>(kAdamWBlock), stream, params);
}

}  // namespace torchweld::kernels::cuda
