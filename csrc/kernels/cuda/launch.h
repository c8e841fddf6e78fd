// What the CUDA kernels share: launching, and moving elements between memory and registers.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/lane.h"

namespace torchweld::kernels::cuda {

template <class T>
struct Same {
  using Type = T;
};

// Nothing to do is no launch, which CUDA would take for an error.
template <class... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                   typename Same<Params>::Type... params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.blockDim.x = static_cast<unsigned>(threads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};

// How kSize bytes are moved: in words of 16 bytes, or of 8 if there are no more.
template <int kSize>
using WordOf = typename Word<kSize % 16 == 0 ? 16 : 8>::Type;

template <class W>
TORCHWELD_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(W) == 0;
}

// kCount elements, of which the first `count` exist; the others are zero. A thread moves whole
// words wherever the memory lies so that it can, one element at a time elsewhere: in views that
// begin in the middle of a word, and behind the last word of a tensor.
template <class T, int kCount>
TORCHWELD_INLINE void load_group(const T* from, int count, T (&to)[kCount]) {
  using W = WordOf<sizeof(T) * kCount>;
  constexpr int kWords = static_cast<int>(sizeof(T) * kCount / sizeof(W));
  if (count == kCount && is_aligned<W>(from)) {
    W words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = __ldcg(reinterpret_cast<const W*>(from) + i);
    }
    memcpy(to, words, sizeof to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < count ? from[i] : T{};
  }
}

template <class T, int kCount>
TORCHWELD_INLINE void store_group(T* to, int count, const T (&from)[kCount]) {
  using W = WordOf<sizeof(T) * kCount>;
  constexpr int kWords = static_cast<int>(sizeof(T) * kCount / sizeof(W));
  if (count == kCount && is_aligned<W>(to)) {
    W words[kWords];
    memcpy(words, from, sizeof from);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      __stcg(reinterpret_cast<W*>(to) + i, words[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

}  // namespace torchweld::kernels::cuda
