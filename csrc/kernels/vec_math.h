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

// 2^x for what is to be added to 1: relative error 1e-7. Underflows to 0, overflows to infinity,
// NaN stays NaN.
TORCHWELD_INLINE VecF coarse_exp2(VecF x) {
  x = min(broadcast<VecF>(130.0f), x);
  x = max(broadcast<VecF>(-150.0f), x);
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF n = (x + magic) - magic, r = x - n;
  // Chebyshev fit of 2^r for |r| <= 1/2.
  VecF p = broadcast<VecF>(0.0013264725f);
  p = fma(p, r, broadcast<VecF>(0.009671513f));
  p = fma(p, r, broadcast<VecF>(0.055507336f));
  p = fma(p, r, broadcast<VecF>(0.24022242f));
  p = fma(p, r, broadcast<VecF>(0.693147f));
  p = fma(p, r, broadcast<VecF>(1.0f));
  return times_power_of_2(p, n);
}

// x * sigmoid(x), where e^-x = 2^(-x / ln 2).
TORCHWELD_INLINE VecF silu(VecF x) { return x / (coarse_exp2(x * -1.44269504f) + 1.0f); }

// x/2 * (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), and (1 + tanh(u)) / 2 = sigmoid(2u):
// again in powers of 2.
TORCHWELD_INLINE VecF gelu_tanh(VecF x) {
  const VecF power = x * fma(x * x, broadcast<VecF>(-0.10294324f), broadcast<VecF>(-2.3022082f));
  return x / (coarse_exp2(power) + 1.0f);
}

// x * Phi(x), Phi the normal distribution. Phi(x) - 1/2 is odd: x times a Chebyshev fit in x^2 over
// |x| <= 5.3, and one half beyond. The result errs by less than 4e-7 (1 + |result|).
TORCHWELD_INLINE VecF gelu(VecF x) {
  const VecF half = broadcast<VecF>(0.5f);
  const VecF square = min(broadcast<VecF>(28.09f), x * x);
  // Within [-1.5, 0.5]: the end, where rounding tells most, is near the middle of the powers.
  const VecF s = fma(square, broadcast<VecF>(0x1.23a250p-4f), broadcast<VecF>(-1.5f));
  // Even and odd powers apart: two short chains.
  const VecF q = s * s;
  VecF even = broadcast<VecF>(-0.00040439737f);
  even = fma(even, q, broadcast<VecF>(-0.00040660042f));
  even = fma(even, q, broadcast<VecF>(0.0006120273f));
  even = fma(even, q, broadcast<VecF>(0.0005326667f));
  even = fma(even, q, broadcast<VecF>(0.0020157502f));
  even = fma(even, q, broadcast<VecF>(0.005810486f));
  even = fma(even, q, broadcast<VecF>(0.0181414f));
  even = fma(even, q, broadcast<VecF>(0.10893353f));
  VecF odd = broadcast<VecF>(-9.5543546e-05f);
  odd = fma(odd, q, broadcast<VecF>(-0.0007397647f));
  odd = fma(odd, q, broadcast<VecF>(0.00013715781f));
  odd = fma(odd, q, broadcast<VecF>(-0.00025686185f));
  odd = fma(odd, q, broadcast<VecF>(-0.0012060652f));
  odd = fma(odd, q, broadcast<VecF>(-0.0034070492f));
  odd = fma(odd, q, broadcast<VecF>(-0.010049916f));
  odd = fma(odd, q, broadcast<VecF>(-0.03630763f));
  const VecF e = min(half, max(-half, x * fma(odd, s, even)));
  return x * (e + half);
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
