// The conversions of cuda_fp16.h.
#pragma once

#include "../cuda_emulator.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa == 0 ? INFINITY : NAN)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(1024.0f + mantissa, exponent - 25);
  return x.bits >> 15 ? -magnitude : magnitude;
}

// Ties to even, as nearbyint() rounds; what that carries goes from the mantissa to the exponent.
inline __half __float2half_rn(float x) {
  const float magnitude = std::fabs(x);
  int bits = 0x7fff;
  if (magnitude >= 65520) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    bits = static_cast<int>(std::nearbyint(magnitude * 0x1p24f));
  } else if (magnitude == magnitude) {
    const int exponent = std::ilogb(magnitude);
    bits = (exponent + 14) * 1024 +
           static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  }
  return {static_cast<unsigned short>(bits | (std::signbit(x) ? 0x8000 : 0))};
}
