// Activation functions on a register, or on a lane of a GPU. Own polynomials instead of libm, and
// every contraction written out as fma, so that each instruction set and CUDA give the same bits.
#pragma once

#if defined(TORCHWELD_LANE)
#include "kernels/cuda/lane.h"
#else
#include "kernels/cpu/vec.h"
#endif

namespace torchweld::kernels::TORCHWELD_ISA {

// x 2^n for integers n of -150 to 256, rounded once.
TORCHWELD_INLINE VecF times_power_of_2(VecF x, VecF n) {
#if defined(__AVX512F__) && !defined(TORCHWELD_LANE)
  return (VecF)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  // In two factors, each a normal number: the product may be subnormal or infinite.
  const VecI32 bits = (VecI32)(bits_of(n + 12582912.0f) - bits_of(broadcast<VecF>(12582912.0f)));
  const VecI32 half = bits >> 1;
  return x * float_of((VecU32)(half + 127) << 23) * float_of((VecU32)(bits - half + 127) << 23);
#endif
}

// e^x. Relative error about 2 ulp; underflows to 0, overflows to infinity, NaN stays NaN.
TORCHWELD_INLINE VecF exp(VecF x) {
  // Beyond these the result is 0 or infinity, and 2^n below would leave the exponent's range.
  x = min(broadcast<VecF>(89.0f), x);
  x = max(broadcast<VecF>(-104.0f), x);
  // n = x / ln 2 to the nearest integer: 1.5 * 2^23 leaves no place for more digits.
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF n = fma(x, broadcast<VecF>(1.44269504f), magic) - magic;
  // r = x - n ln 2, with ln 2 in two parts (Cody and Waite); |r| <= ln 2 / 2.
  VecF r = fma(n, broadcast<VecF>(-0x1.62e400p-1f), x);
  r = fma(n, broadcast<VecF>(-0x1.7f7d1cp-20f), r);
  // Chebyshev fit of e^r, error 2e-9.
  VecF p = broadcast<VecF>(0x1.6da758p-10f);
  p = fma(p, r, broadcast<VecF>(0x1.126facp-7f));
  p = fma(p, r, broadcast<VecF>(0x1.555464p-5f));
  p = fma(p, r, broadcast<VecF>(0x1.555404p-3f));
  p = fma(p, r, broadcast<VecF>(0.5f));
  p = fma(p, r, broadcast<VecF>(1.0f));
  p = fma(p, r, broadcast<VecF>(1.0f));
  return times_power_of_2(p, n);
}

// NaN stays NaN.
TORCHWELD_INLINE VecF relu(VecF x) { return max(VecF{}, x); }

// x * sigmoid(z)
TORCHWELD_INLINE VecF times_sigmoid(VecF x, VecF z) { return x / (exp(-z) + 1.0f); }

TORCHWELD_INLINE VecF silu(VecF x) { return times_sigmoid(x, x); }

// x/2 * (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), and (1 + tanh(u)) / 2 = sigmoid(2u).
TORCHWELD_INLINE VecF gelu_tanh(VecF x) {
  const VecF inner = fma(x * x * 0.044715f, x, x);
  return times_sigmoid(x, inner * 1.59576912f);
}

// x * Phi(x), Phi the normal distribution: Phi(-|x|) = erfc(t) / 2 with t = |x| / sqrt(2).
// erfc(t) = u exp(v R(v) - t^2), u = 2 / (2 + t), v = 1 - u; R is a Chebyshev fit (error 2e-7) of
// ln(erfcx(t) / u) / v, so that erfc(0) = 1 exactly. The form is that of Numerical Recipes, 6.2.
TORCHWELD_INLINE VecF gelu(VecF x) {
  const VecI32 negative = x < VecF{};
  const VecF t = float_of(bits_of(x) & 0x7fffffffu) * 0.70710678f;
  const VecF u = 2.0f / (t + 2.0f);
  const VecF v = 1.0f - u;
  VecF p = broadcast<VecF>(-0.08636048f);
  p = fma(p, v, broadcast<VecF>(0.4074664f));
  p = fma(p, v, broadcast<VecF>(-0.5971005f));
  p = fma(p, v, broadcast<VecF>(0.24098589f));
  p = fma(p, v, broadcast<VecF>(-0.040193636f));
  p = fma(p, v, broadcast<VecF>(0.20977372f));
  p = fma(p, v, broadcast<VecF>(0.16004057f));
  p = fma(p, v, broadcast<VecF>(-0.3031924f));
  p = fma(p, v, broadcast<VecF>(-1.2567586f));
  const VecF tail = u * 0.5f * exp(fma(p, v, -(t * t)));
  return x * (negative ? tail : 1.0f - tail);
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
