// One register of the instruction set this file is compiled for, in GCC/Clang vector extensions.
//
// Arithmetic is the operators of the extension; what it lacks (fma, sqrt, conversions) is below.
// Only intrinsics, C headers and builtins may be used here: an inline function of the standard
// library compiled with -mavx512f could be kept by the linker for callers on older CPUs.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Of functions that kernels/cuda compiles too.
#define TORCHWELD_INLINE inline

namespace torchweld::kernels::TORCHWELD_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VecI64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef int8_t VecI8 __attribute__((vector_size(kVectorBytes / 4)));
typedef uint8_t VecU8 __attribute__((vector_size(kVectorBytes / 4)));

inline constexpr int kLanesF = kVectorBytes / 4;
inline constexpr int kLanesD = kVectorBytes / 8;

// Arithmetic type, register and lane count for a storage type: 16-bit floats compute in float.
template <class T>
struct Math {
  using Scalar = float;
  using Vec = VecF;
  using Mask = VecI32;
  static constexpr int kLanes = kLanesF;
};
template <>
struct Math<double> {
  using Scalar = double;
  using Vec = VecD;
  using Mask = VecI64;
  static constexpr int kLanes = kLanesD;
};

// Four bytes as the integer whose broadcast repeats them.
inline int32_t load_quad(const int8_t* p) {
  int32_t quad;
  memcpy(&quad, p, sizeof quad);
  return quad;
}

template <class V, class S>
inline V broadcast(S s) {
  return s - V{};  // and not V{} + s, which would lose the sign of -0
}

inline VecU32 bits_of(VecF x) { return (VecU32)x; }
inline VecF float_of(VecU32 bits) { return (VecF)bits; }

// --- fused multiply-add and square root ----------------------------------------------------------
#if defined(__AVX512F__)
inline VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
inline VecF sqrt(VecF a) { return (VecF)_mm512_sqrt_ps((__m512)a); }
inline VecD sqrt(VecD a) { return (VecD)_mm512_sqrt_pd((__m512d)a); }
#elif defined(__AVX2__)
inline VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
inline VecF sqrt(VecF a) { return (VecF)_mm256_sqrt_ps((__m256)a); }
inline VecD sqrt(VecD a) { return (VecD)_mm256_sqrt_pd((__m256d)a); }
#else
inline VecF fma(VecF a, VecF b, VecF c) {
  VecF r;
  for (int i = 0; i < kLanesF; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
inline VecD fma(VecD a, VecD b, VecD c) {
  VecD r;
  for (int i = 0; i < kLanesD; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
}
inline VecF sqrt(VecF a) {
  VecF r;
  for (int i = 0; i < kLanesF; ++i) r[i] = __builtin_sqrtf(a[i]);
  return r;
}
inline VecD sqrt(VecD a) {
  VecD r;
  for (int i = 0; i < kLanesD; ++i) r[i] = __builtin_sqrt(a[i]);
  return r;
}
#endif

// a if it is less (greater) than b, else b: so b if either is NaN.
#if defined(__AVX512F__)
inline VecF min(VecF a, VecF b) { return (VecF)_mm512_min_ps((__m512)a, (__m512)b); }
inline VecF max(VecF a, VecF b) { return (VecF)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline VecF min(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)a, (__m256)b); }
inline VecF max(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline VecF min(VecF a, VecF b) { return a < b ? a : b; }
inline VecF max(VecF a, VecF b) { return a > b ? a : b; }
#endif

// a where `mask` has a one bit, else b.
inline VecU32 select_bits(VecU32 mask, VecU32 a, VecU32 b) {
#if defined(__AVX512F__)
  return (VecU32)_mm512_ternarylogic_epi32((__m512i)mask, (__m512i)a, (__m512i)b, 0xca);
#else
  return (a & mask) | (b & ~mask);
#endif
}

// --- bytes ---------------------------------------------------------------------------------------
// GCC 12 takes __builtin_convertvector between bytes and words apart lane by lane.
#if defined(__AVX512F__)
inline VecI8 low_bytes(VecI32 a) { return (VecI8)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)a); }
inline VecI32 widen(VecI8 a) { return (VecI32)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)a); }
inline VecU32 widen(VecU8 a) { return (VecU32)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)a); }
#elif defined(__AVX2__)
inline VecI8 low_bytes(VecI32 a) {
  const __m256i first =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8((__m256i)a, first);
  const __m128i joined =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  VecI8 result;
  memcpy(&result, &joined, sizeof result);
  return result;
}
inline VecI32 widen(VecI8 a) {
  __m128i bytes = _mm_setzero_si128();
  memcpy(&bytes, &a, sizeof a);
  return (VecI32)_mm256_cvtepi8_epi32(bytes);
}
inline VecU32 widen(VecU8 a) {
  __m128i bytes = _mm_setzero_si128();
  memcpy(&bytes, &a, sizeof a);
  return (VecU32)_mm256_cvtepu8_epi32(bytes);
}
#else
inline VecI8 low_bytes(VecI32 a) { return __builtin_convertvector(a, VecI8); }
inline VecI32 widen(VecI8 a) { return __builtin_convertvector(a, VecI32); }
inline VecU32 widen(VecU8 a) { return __builtin_convertvector(a, VecU32); }
#endif

// --- 16-bit floats -------------------------------------------------------------------------------
// GCC takes __builtin_convertvector apart into halves; each of these is one or two instructions.
#if defined(__AVX512F__)
inline VecU32 widen(VecU16 v) { return (VecU32)_mm512_cvtepu16_epi32((__m256i)v); }
inline VecU16 narrow(VecU32 v) { return (VecU16)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
inline VecU32 widen(VecU16 v) { return (VecU32)_mm256_cvtepu16_epi32((__m128i)v); }
// Saturates, where the others cut: for values below 2^16.
inline VecU16 narrow(VecU32 v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  return (VecU16)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
inline VecU32 widen(VecU16 v) { return __builtin_convertvector(v, VecU32); }
inline VecU16 narrow(VecU32 v) { return __builtin_convertvector(v, VecU16); }
#endif

inline VecF to_float(VecU16 bits, BFloat16) { return (VecF)(widen(bits) << 16); }

// Round to nearest even; NaN stays NaN (its payload's top bits, made quiet).
inline VecU16 from_float(VecF value, BFloat16) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const VecU32 quiet = bits | 0x400000u;
  const VecI32 is_nan = value != value;
  return narrow((is_nan ? quiet : rounded) >> 16);
}

#if defined(__AVX512F__)
inline VecF to_float(VecU16 bits, Float16) { return (VecF)_mm512_cvtph_ps((__m256i)bits); }
inline VecU16 from_float(VecF value, Float16) {
  return (VecU16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
inline VecF to_float(VecU16 bits, Float16) { return (VecF)_mm256_cvtph_ps((__m128i)bits); }
inline VecU16 from_float(VecF value, Float16) {
  return (VecU16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// Bit conversions after Fabian Giesen, "float->half variants"
// (https://gist.github.com/rygorous/2156668): exact, subnormals and NaN included.
inline float half_bits_to_float(uint16_t half) {
  uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
  const uint32_t exponent = bits & 0x0f800000u;
  bits += (127 - 15) << 23;
  if (exponent == 0x0f800000u) {
    bits += (128 - 16) << 23;  // infinity, NaN
  } else if (exponent == 0) {  // zero, subnormal: renormalize by a subtraction of 2^-14
    bits += 1 << 23;
    float f, magic;
    const uint32_t magic_bits = 113u << 23;
    memcpy(&f, &bits, 4);
    memcpy(&magic, &magic_bits, 4);
    f -= magic;
    memcpy(&bits, &f, 4);
  }
  bits |= (uint32_t)(half & 0x8000) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}

inline uint16_t float_to_half_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));  // NaN
  if (bits >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);  // infinity, overflow
  if (bits < 0x38800000u) {  // subnormal or zero: the adder of the FPU does the rounding
    float f, magic = 0.5f;
    memcpy(&f, &bits, 4);
    f += magic;
    uint32_t magic_bits, sum;
    memcpy(&magic_bits, &magic, 4);
    memcpy(&sum, &f, 4);
    return (uint16_t)(sign | (sum - magic_bits));
  }
  const uint32_t odd = (bits >> 13) & 1u;
  bits += ((uint32_t)(15 - 127) << 23) + 0xfffu + odd;
  return (uint16_t)(sign | (bits >> 13));
}

inline VecF to_float(VecU16 bits, Float16) {
  VecF r;
  for (int i = 0; i < kLanesF; ++i) r[i] = half_bits_to_float(bits[i]);
  return r;
}
inline VecU16 from_float(VecF value, Float16) {
  VecU16 r;
  for (int i = 0; i < kLanesF; ++i) r[i] = float_to_half_bits(value[i]);
  return r;
}
#endif

// --- load and store, any alignment ---------------------------------------------------------------
inline VecF load(const float* p) {
  VecF v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline VecD load(const double* p) {
  VecD v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline VecF load(const T* p) {
  VecU16 bits;
  memcpy(&bits, p, sizeof bits);
  return to_float(bits, T{});
}

inline void store(float* p, VecF v) { memcpy(p, &v, sizeof v); }
inline void store(double* p, VecD v) { memcpy(p, &v, sizeof v); }
template <class T>
inline void store(T* p, VecF v) {
  const VecU16 bits = from_float(v, T{});
  memcpy(p, &bits, sizeof bits);
}

// Past the caches, to memory on a register's border: a line is not read only to be overwritten, and
// nothing is driven out for what nobody reads soon. Other threads see it after drain().
#if defined(__AVX512F__)
inline void stream(float* p, VecF v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream(double* p, VecD v) { _mm512_stream_pd(p, (__m512d)v); }
template <class T>
inline void stream(T* p, VecF v) {
  _mm256_stream_si256((__m256i*)p, (__m256i)from_float(v, T{}));
}
#elif defined(__AVX2__)
inline void stream(float* p, VecF v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream(double* p, VecD v) { _mm256_stream_pd(p, (__m256d)v); }
template <class T>
inline void stream(T* p, VecF v) {
  _mm_stream_si128((__m128i*)p, (__m128i)from_float(v, T{}));
}
#else
template <class T>
inline void stream(T* p, typename Math<T>::Vec v) {
  store(p, v);
}
#endif
inline void drain() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The first `count` elements; the other lanes are zero.
template <class T>
inline typename Math<T>::Vec load_partial(const T* p, int64_t count) {
  T buffer[Math<T>::kLanes];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, (size_t)count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_partial(T* p, typename Math<T>::Vec v, int64_t count) {
  T buffer[Math<T>::kLanes];
  store(buffer, v);
  memcpy(p, buffer, (size_t)count * sizeof(T));
}

#if defined(__AVX512F__)
inline VecF load_partial(const float* p, int64_t count) {
  return (VecF)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
inline void store_partial(float* p, VecF v, int64_t count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
inline VecF load_partial(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p);
  return to_float((VecU16)bits, BFloat16{});
}
inline void store_partial(BFloat16* p, VecF v, int64_t count) {
  const __m256i bits = (__m256i)from_float(v, BFloat16{});
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), bits);
}
#elif defined(__AVX2__)
inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane);
}
inline VecF load_partial(const float* p, int64_t count) {
  return (VecF)_mm256_maskload_ps(p, first_lanes(count));
}
inline void store_partial(float* p, VecF v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
}
#endif

// The lanes in double, lower half first. GCC 12 takes __builtin_convertvector apart here too.
inline void widen(VecD v, VecD (&out)[1]) { out[0] = v; }
inline void widen(VecF v, VecD (&out)[2]) {
#if defined(__AVX512F__)
  out[0] = (VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  out[1] = (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  out[0] = (VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  out[1] = (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));
  HalfF half[2];
  memcpy(half, &v, sizeof v);
  out[0] = __builtin_convertvector(half[0], VecD);
  out[1] = __builtin_convertvector(half[1], VecD);
#endif
}

// And back, rounded to the nearest.
inline VecD narrow(const VecD (&in)[1]) { return in[0]; }
inline VecF narrow(const VecD (&in)[2]) {
  typedef float HalfF __attribute__((vector_size(kVectorBytes / 2)));
  const HalfF half[2] = {__builtin_convertvector(in[0], HalfF),
                         __builtin_convertvector(in[1], HalfF)};
  VecF v;
  memcpy(&v, half, sizeof v);
  return v;
}

// The value rounded to what storing it as T and loading it again would give.
template <class T>
inline typename Math<T>::Vec round_to(typename Math<T>::Vec v) {
  if constexpr (sizeof(T) == 2) {
    return to_float(from_float(v, T{}), T{});
  } else {
    return v;
  }
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
