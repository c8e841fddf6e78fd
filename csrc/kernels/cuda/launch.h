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

using Word = uint4;  // the most a thread moves at once

template <class T, int kCount>
inline constexpr int kWordsOf = static_cast<int>(sizeof(T) * kCount / sizeof(Word));

TORCHWELD_INLINE bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Word) == 0;
}

// kCount elements, of which the first `count` exist; the others are zero. A thread moves whole
// words wherever the memory lies so that it can, one element at a time elsewhere: in views that
// begin in the middle of a word, and behind the last word of a tensor.
template <class T, int kCount>
TORCHWELD_INLINE void load_group(const T* from, int count, T (&to)[kCount]) {
  constexpr int kWords = kWordsOf<T, kCount>;
  static_assert(sizeof(T) * kCount == sizeof(Word) * kWords);
  if (count == kCount && is_aligned(from)) {
    Word words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = __ldcg(reinterpret_cast<const Word*>(from) + i);
    }
    memcpy(to, words, sizeof to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = i < count ? from[i] : T{};
  }
}

template <class T, int kCount>
TORCHWELD_INLINE void store_group(T* to, int count, const T (&from)[kCount]) {
  constexpr int kWords = kWordsOf<T, kCount>;
  static_assert(sizeof(T) * kCount == sizeof(Word) * kWords);
  if (count == kCount && is_aligned(to)) {
    Word words[kWords];
    memcpy(words, from, sizeof from);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      __stcg(reinterpret_cast<Word*>(to) + i, words[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

}  // namespace torchweld::kernels::cuda
