// The minifloats of int8 AdamW states (kernels/adamw.h gives their values), by shifts of float
// bits: no table, no search, no subnormal numbers.
//
// A magnitude in units of its top value is scaled to [0, top - 2] and 2 is added. From 2 on, floats
// have exponents 128, 129, ..., so the exponent's low bits and three of the mantissa are the code,
// and the float between two codes says exactly how near it is to either: adding 20 random bits
// below the code rounds stochastically, adding half rounds to nearest.
#pragma once

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

inline constexpr uint32_t kFirstBits = 0x40000000u;  // of 2.0f, code 0
inline constexpr int kCodeShift = 20;
inline constexpr float kCodeOne = 2.25f;

inline VecF code_float(VecU32 code) { return (VecF)((code << kCodeShift) | kFirstBits); }

// kTop: the float of the highest code; kRange: the value of that code.
struct ExpAvgCodec {
  static constexpr float kTop = 0x1.ep16f;
  static constexpr float kRange = kTop - 2;
  static constexpr float kLeastScale = 0x1p-100f;  // keeps kRange / scale finite

  // `code` sign-extended. In units of scale / kRange.
  static VecF decode(VecI32 code) {
    const VecU32 magnitude = (VecU32)code & 0x7fu;
    const VecU32 sign = ((VecU32)code << 24) & 0x80000000u;
    return (VecF)((VecU32)(code_float(magnitude) - 2.0f) | sign);
  }
};

struct ExpAvgSqCodec {
  static constexpr float kTop = 0x1.ep32f;
  static constexpr float kRange = kTop - 2;
  static constexpr float kLeastScale = 0x1p-90f;

  static VecF decode(VecI32 code) { return code_float((VecU32)code & 0xffu) - 2.0f; }
};

// The code of a magnitude, in the low bits. `inverse` is kRange / scale, `random` has 20 bits. NaN
// and what is above the scale get the top code, so that a rounding error of the scale cannot carry
// into the sign. `least`: 2, or kCodeOne to keep code 0 away.
template <class Codec>
inline VecU32 code_of(VecF magnitude, VecF inverse, VecF least, VecU32 random) {
  const VecF top = broadcast<VecF>(Codec::kTop);
  VecF y = fma(magnitude, inverse, broadcast<VecF>(2.0f));
  y = y < top ? y : top;
  y = y > least ? y : least;
  return ((VecU32)y + random) >> kCodeShift;
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
