// One lane: what kernels/cpu/vec.h calls a register, for code that runs as one thread of many. The
// same names, so that the arithmetic of an operator can be written once.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "kernels/dtype.h"

#define TORCHWELD_ISA cuda

#define TORCHWELD_INLINE __device__ __forceinline__

namespace torchweld::kernels::cuda {

using VecF = float;
using VecD = double;
using VecI32 = int32_t;
using VecU32 = uint32_t;

// Arithmetic type and register for a storage type: 16-bit floats compute in float.
template <class T>
struct Math {
  using Scalar = float;
  using Vec = float;
};
template <>
struct Math<double> {
  using Scalar = double;
  using Vec = double;
};

template <class V, class S>
TORCHWELD_INLINE V broadcast(S s) {
  return static_cast<V>(s);
}

TORCHWELD_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
TORCHWELD_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
TORCHWELD_INLINE float sqrt(float a) { return sqrtf(a); }
TORCHWELD_INLINE double sqrt(double a) { return ::sqrt(a); }

// a if it is less (greater) than b, else b: so b if either is NaN.
TORCHWELD_INLINE float min(float a, float b) { return a < b ? a : b; }
TORCHWELD_INLINE float max(float a, float b) { return a > b ? a : b; }

TORCHWELD_INLINE uint32_t bits_of(float x) { return __float_as_uint(x); }
TORCHWELD_INLINE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// a where `mask` has a one bit, else b.
TORCHWELD_INLINE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

TORCHWELD_INLINE float to_vec(float x) { return x; }
TORCHWELD_INLINE double to_vec(double x) { return x; }
TORCHWELD_INLINE float to_vec(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
TORCHWELD_INLINE float to_vec(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounded to nearest even; NaN stays NaN.
template <class T>
TORCHWELD_INLINE T from_vec(typename Math<T>::Vec x) {
  if constexpr (sizeof(T) > 2) {
    return x;
  } else if constexpr (__is_same(T, Float16)) {
    return {__half_as_ushort(__float2half_rn(x))};
  } else {
#if defined(__CUDA_ARCH__)
    uint16_t rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return {rounded};
#else
    const uint32_t bits = bits_of(x), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16)};
#endif
  }
}

}  // namespace torchweld::kernels::cuda
