// Conversions of cuda_fp16.h, by the compiler's own 16-bit type.
#pragma once

#include "../cuda_emulator.h"

struct __half {
  _Float16 value;
};

inline __half __ushort_as_half(unsigned short bits) {
  return cuda_emulator::bit_cast<__half>(bits);
}
inline unsigned short __half_as_ushort(__half x) {
  return cuda_emulator::bit_cast<unsigned short>(x);
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
