// What the step kernels share: which elements of which tensor a block works on.
#pragma once

#include "kernels/adamw_math.h"
#include "kernels/cuda/adamw.h"
#include "kernels/cuda/launch.h"

namespace torchweld::kernels::cuda {

inline constexpr int kStepThreads = 256;

// The elements [begin, end) of a tensor; none if the step is skipped.
struct StepWork {
  TORCHWELD_INLINE explicit StepWork(const AdamWStepParams& params) {
    const Chunk chunk = params.chunks[blockIdx.x];
    tensor = &params.tensors[chunk.tensor];
    scalars = &params.scalars[chunk.tensor];
    grad = params.grads[chunk.tensor].data;
    begin = chunk.number * params.chunk_size;
    end = begin + params.chunk_size;
    if (end > tensor->span.size) end = tensor->span.size;
    if (*params.skipped != 0) end = begin;
  }

  // Of the elements from `i` on, how many of kCount there are.
  template <int kCount>
  TORCHWELD_INLINE int count(int64_t i) const {
    return end - i < kCount ? static_cast<int>(end - i) : kCount;
  }

  const AdamWTensor* tensor;
  const AdamWScalars* scalars;
  const void* grad;
  int64_t begin, end;
};

// The random bits of an element, which are those of its CPU step.
TORCHWELD_INLINE RandomBits random_at(int64_t index, uint64_t key) {
  return RandomBits::of(
      static_cast<uint32_t>(index) * RandomBits::kWeyl + static_cast<uint32_t>(key),
      static_cast<uint32_t>(key >> 32));
}

TORCHWELD_INLINE uint32_t upper(uint16_t bits) { return static_cast<uint32_t>(bits) << 16; }
TORCHWELD_INLINE uint16_t upper_half(uint32_t bits) { return static_cast<uint16_t>(bits >> 16); }

// A parameter in float, with what its compensation holds.
template <AdamWRounding kRounding, class T>
TORCHWELD_INLINE float weight_of(T p, uint16_t c) {
  if constexpr (__is_same(T, BFloat16)) {
    Weight16<kRounding> w{upper(p.bits), 0};
    if constexpr (kCompensated<kRounding>) w.compensation = upper(c);
    return w.value();
  } else {
    return to_vec(p);
  }
}

// Steps a parameter, and its compensation if this rounding has one, with its new moments.
template <AdamWRounding kRounding, class T>
TORCHWELD_INLINE void step_weight(const LowBitStep& step, T& p, uint16_t& c, float m, float v,
                                  RandomBits bits) {
  if constexpr (__is_same(T, BFloat16)) {
    Weight16<kRounding> w{upper(p.bits), 0};
    if constexpr (kCompensated<kRounding>) w.compensation = upper(c);
    w = Weight16<kRounding>::of(step.weight(w.value(), m, v), bits.other16());
    p.bits = upper_half(w.param);
    if constexpr (kCompensated<kRounding>) c = upper_half(w.compensation);
  } else {
    p = from_vec<T>(step.weight(to_vec(p), m, v));
  }
}

// The launchers of one kind of states each.
cudaError_t launch_like_param(const AdamWKind& kind, const AdamWStepParams& params,
                              cudaStream_t stream);
cudaError_t launch_bfloat16(const AdamWKind& kind, const AdamWStepParams& params,
                            cudaStream_t stream);
cudaError_t launch_int8(const AdamWKind& kind, const AdamWStepParams& params, cudaStream_t stream);

}  // namespace torchweld::kernels::cuda
