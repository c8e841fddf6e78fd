// Quantizing a row, or a group of one, by several threads together.
#pragma once

#include "kernels/cuda/launch.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels::cuda {

struct RowScale {
  TORCHWELD_INLINE explicit RowScale(uint32_t largest_bits) {
    constexpr uint32_t kInfinityBits = 0x7f800000u, kNaNBits = 0x7fc00000u;
    constexpr float kTiny = 0x1p-126f;
    is_finite = largest_bits < kInfinityBits;
    const float quotient = float_of(largest_bits) / 127.0f;
    scale = is_finite ? (quotient < kTiny ? kTiny : quotient) : float_of(kNaNBits);
    inverse = 1.0f / scale;
  }
  // Rounded to nearest even: 1.5 * 2^23 leaves no place for more digits.
  TORCHWELD_INLINE uint32_t quantized(float x) const {
    return is_finite ? bits_of(x * inverse + 12582912.0f) & 0xffu : 0u;
  }

  bool is_finite;
  float scale, inverse;
};

// Elements of one row or group, for the threads of a team: `thread` of kThreads, which are a block
// or, if 32, a warp.
template <class T, int kThreads>
class RowQuantizer {
 public:
  static constexpr int kCount = 16 / sizeof(T);

  // What is shared by the threads of a block.
  struct Shared {
    uint32_t largest[kThreads / 32];
  };

  // x[size] to quantized[padded], both multiples of 4; zeros behind `size`. Returns the scale.
  // All threads come here, and may use neither `shared` nor the row before the next barrier.
  TORCHWELD_INLINE static float run(const T* x, int64_t size, int8_t* quantized, int64_t padded,
                                    int thread, Shared* shared) {
    // What fits stays in registers; the rest is read again.
    T kept[kKept][kCount];
    uint32_t largest = 0;
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int64_t i = (static_cast<int64_t>(j) * kThreads + thread) * kCount;
      load_group(x + i, left(size, i), kept[j]);
      largest = larger(largest, kept[j]);
    }
    constexpr int64_t kRound = static_cast<int64_t>(kThreads) * kCount;
    for (int64_t i = kKept * kRound + thread * kCount; i < size; i += kRound) {
      T more[kCount];
      load_group(x + i, left(size, i), more);
      largest = larger(largest, more);
    }
    const RowScale scale(of_team(largest, thread, shared));
#pragma unroll
    for (int j = 0; j < kKept; ++j) {
      const int64_t i = (static_cast<int64_t>(j) * kThreads + thread) * kCount;
      store(scale, kept[j], quantized, i, padded);
    }
    for (int64_t i = kKept * kRound + thread * kCount; i < padded; i += kRound) {
      T more[kCount];
      load_group(x + i, left(size, i), more);
      store(scale, more, quantized, i, padded);
    }
    return scale.scale;
  }

 private:
  static constexpr int kKept = kThreads == 32 ? 1 : 4;

  TORCHWELD_INLINE static int left(int64_t size, int64_t i) {
    return size - i < kCount ? (size > i ? static_cast<int>(size - i) : 0) : kCount;
  }

  // As integers, finite < infinity < NaN: one maximum finds the range and whatever is not finite.
  TORCHWELD_INLINE static uint32_t larger(uint32_t largest, const T (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = bits_of(to_vec(x[i])) & 0x7fffffffu;
      largest = largest > bits ? largest : bits;
    }
    return largest;
  }

  TORCHWELD_INLINE static uint32_t of_team(uint32_t largest, int thread, Shared* shared) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
      largest = largest > other ? largest : other;
    }
    if constexpr (kThreads > 32) {
      if (thread % 32 == 0) shared->largest[thread / 32] = largest;
      __syncthreads();
      for (int warp = 0; warp < kThreads / 32; ++warp) {
        largest = largest > shared->largest[warp] ? largest : shared->largest[warp];
      }
    }
    return largest;
  }

  TORCHWELD_INLINE static void store(const RowScale& scale, const T (&x)[kCount], int8_t* quantized,
                                     int64_t i, int64_t padded) {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      if (i + j >= padded) return;
      uint32_t word = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b) word |= scale.quantized(to_vec(x[j + b])) << (8 * b);
      *reinterpret_cast<uint32_t*>(quantized + i + j) = word;
    }
  }
};

}  // namespace torchweld::kernels::cuda
