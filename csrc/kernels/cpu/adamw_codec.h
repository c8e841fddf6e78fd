// The minifloats of int8 AdamW states (kernels/adamw.h gives their values), by shifts of float
// bits: no table, no search, no subnormal numbers.
//
// A magnitude is scaled to [0, top - 2] and 2 is added. From 2 on, floats have exponents 128, 129,
// ..., so the exponent's low bits and three of the mantissa are the code, and the other 20 say how
// far it is to the next: adding 20 random bits rounds stochastically, adding half to nearest.
#pragma once

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

inline constexpr int kCodeShift = 20;
inline constexpr float kCodeZero = 2.0f;
inline constexpr float kCodeOne = 2.25f;
inline constexpr uint32_t kCodeZeroBits = 0x40000000u;
inline constexpr uint32_t kRoundNearest = 1u << (kCodeShift - 1);

// kTop: the float of the highest code. kRange: that code's magnitude.
struct ExpAvgCodec {
  static constexpr float kTop = 0x1.ep16f;
  static constexpr float kRange = kTop - kCodeZero;
  static constexpr float kLeastScale = 0x1p-100f;  // keeps kRange / scale finite

  // `unit`: scale / kRange.
  static VecF decode(const uint8_t* codes, VecF unit) {
    VecI8 bytes;
    memcpy(&bytes, codes, sizeof bytes);
    const VecU32 bits = (VecU32)widen(bytes) << kCodeShift;  // signed: the sign in bit 31
    const VecU32 zero_bits = broadcast<VecU32>(kCodeZeroBits);
    const VecU32 code = broadcast<VecU32>(0x7fu << kCodeShift);
    const VecF magnitude = fma((VecF)select_bits(code, bits, zero_bits), unit, -kCodeZero * unit);
    return (VecF)select_bits(broadcast<VecU32>(0x80000000u), bits, (VecU32)magnitude);
  }

  // `inverse`: kRange / scale; `random` has 20 bits. What is above the scale gets the top code, so
  // that a rounding error of the scale cannot carry into the sign; so does NaN.
  static void encode(uint8_t* codes, VecF x, VecF inverse, VecU32 random) {
    const VecF magnitude = (VecF)((VecU32)x & 0x7fffffffu);
    const VecF y = min(fma(magnitude, inverse, broadcast<VecF>(kCodeZero)), broadcast<VecF>(kTop));
    const VecU32 code = ((VecU32)y + random) >> kCodeShift;
    const VecU32 sign = (VecU32)x >> 24;
    const VecI8 bytes = low_bytes((VecI32)select_bits(broadcast<VecU32>(0x7fu), code, sign));
    memcpy(codes, &bytes, sizeof bytes);
  }
};

struct ExpAvgSqCodec {
  static constexpr float kTop = 0x1.ep32f;
  static constexpr float kRange = kTop - kCodeZero;
  static constexpr float kLeastScale = 0x1p-90f;

  static VecF decode(const uint8_t* codes, VecF unit) {
    VecU8 bytes;
    memcpy(&bytes, codes, sizeof bytes);
    return fma((VecF)((widen(bytes) << kCodeShift) | kCodeZeroBits), unit, -kCodeZero * unit);
  }

  // No code below that of `least`, which is kCodeZero or kCodeOne.
  static void encode(uint8_t* codes, VecF x, VecF inverse, VecU32 random, VecF least) {
    const VecF y = min(fma(x, inverse, broadcast<VecF>(kCodeZero)), broadcast<VecF>(kTop));
    const VecI8 bytes = low_bytes((VecI32)(((VecU32)max(y, least) + random) >> kCodeShift));
    memcpy(codes, &bytes, sizeof bytes);
  }
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
