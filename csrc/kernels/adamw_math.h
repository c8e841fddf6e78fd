// The arithmetic of the AdamW steps, once for every instruction set and for CUDA: on `VecF` and
// `VecU32`, which kernels/cpu/vec.h makes a register of several lanes and kernels/cuda/lane.h a
// single one. Each operation is rounded by itself (both compilers are told not to contract), so
// equal inputs give equal bits everywhere, but for the payload of a NaN.
#pragma once

#include "kernels/adamw.h"

#if defined(TORCHWELD_LANE)
#include "kernels/cuda/lane.h"
#else
#include "kernels/cpu/vec.h"
#endif

namespace torchweld::kernels::TORCHWELD_ISA {

// The step of torch's fused CPU kernel.
template <class T>
struct Step {
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;

  TORCHWELD_INLINE explicit Step(const AdamWScalars& s)
      : decay(broadcast<Vec>((Scalar)s.decay)),
        grad_scale(broadcast<Vec>((Scalar)s.grad_scale)),
        beta2(broadcast<Vec>((Scalar)s.beta2)),
        c2(broadcast<Vec>((Scalar)(1.0 - s.beta2))),
        step_size(broadcast<Vec>((Scalar)-s.step_size)),
        bias_root(broadcast<Vec>((Scalar)s.bias_root)),
        eps(broadcast<Vec>((Scalar)s.eps)) {
    // lerp(m, g, c1) from the nearer end, so that c1 = 1 gives g exactly.
    const Scalar c1 = (Scalar)(1.0 - s.beta1);
    from_m = c1 < (Scalar)0.5;
    lerp_weight = broadcast<Vec>(from_m ? c1 : c1 - 1);
  }

  Vec decay, grad_scale, beta2, c2, step_size, bias_root, eps, lerp_weight;
  bool from_m;

  // v_max is null unless amsgrad. `tail`: torch's loop over what fills no register of its own was
  // contracted the other way round; the two differ by at most one ulp of v.
  TORCHWELD_INLINE void update(Vec& p, Vec g, Vec& m, Vec& v, Vec* v_max, bool tail) const {
    g = g * grad_scale;
    p = p * decay;
    m = fma(lerp_weight, g - m, from_m ? m : g);
    v = tail ? fma(v, beta2, c2 * g * g) : fma(c2 * g, g, v * beta2);
    Vec second = v;
    if (v_max != nullptr) {
      // NaN wins, as in torch.maximum.
      *v_max = ((*v_max > v) | (*v_max != *v_max)) ? *v_max : v;
      second = *v_max;
    }
    const Vec denominator = sqrt(second) / bias_root + eps;
    p = p + (step_size * m) / denominator;
  }
};

// torch's fused step is AVX2 code: this many elements of a storage type fill one of its registers,
// and what is left of a tensor after them is its tail.
template <class T>
inline constexpr int kTorchLanes = 32 / (int)sizeof(T);

// The formula in float, with one division: there are no bits of torch's to match here.
struct LowBitStep {
  TORCHWELD_INLINE explicit LowBitStep(const AdamWScalars& s)
      : decay(broadcast<VecF>((float)s.decay)),
        grad_scale(broadcast<VecF>((float)s.grad_scale)),
        c1(broadcast<VecF>((float)(1.0 - s.beta1))),
        c2(broadcast<VecF>((float)(1.0 - s.beta2))),
        step_size(broadcast<VecF>((float)-s.step_size)),
        inverse_root(broadcast<VecF>((float)(1.0 / s.bias_root))),
        eps(broadcast<VecF>((float)s.eps)) {}

  VecF decay, grad_scale, c1, c2, step_size, inverse_root, eps;

  // `m` and `v` arrive multiplied by beta1 and beta2.
  TORCHWELD_INLINE void moments(VecF g, VecF& m, VecF& v) const {
    g = g * grad_scale;
    m = fma(c1, g, m);
    v = fma(c2 * g, g, v);
  }

  TORCHWELD_INLINE VecF weight(VecF p, VecF m, VecF v) const {
    return fma(p, decay, (step_size * m) / fma(sqrt(v), inverse_root, eps));
  }
};

// The largest v so far; NaN wins.
TORCHWELD_INLINE VecF larger(VecF old, VecF v) { return ((old > v) | (old != old)) ? old : v; }

// 32 random bits of an element.
struct RandomBits {
  VecU32 word;
  // For the moments. What the 20 bits share is the least of the upper, and of no weight.
  TORCHWELD_INLINE VecU32 low20() const { return word & 0xfffffu; }
  TORCHWELD_INLINE VecU32 high20() const { return word >> 12; }
  TORCHWELD_INLINE VecU32 low16() const { return word & 0xffffu; }
  TORCHWELD_INLINE VecU32 high16() const { return word >> 16; }
  // For the parameter.
  TORCHWELD_INLINE VecU32 other16() const { return (word * kWeyl) >> 16; }

  static constexpr uint32_t kWeyl = 0x9e3779b1u;  // 2^32 over the golden ratio

  // Counted by its index: a Weyl sequence through the rounds of Chris Wellons' lowbias32
  // (https://nullprogram.com/blog/2018/07/31/), one half of the key before them and one between.
  // `counter`: index * kWeyl + lower half of the key; `middle`: its upper half.
  TORCHWELD_INLINE static RandomBits of(VecU32 counter, VecU32 middle) {
    VecU32 x = counter;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= (x >> 15) ^ middle;
    x *= 0x846ca68bu;
    return {x ^ (x >> 16)};
  }
};

// A float rounded to bfloat16, in the upper half; the lower is for the caller to drop. NaN stays.
TORCHWELD_INLINE VecU32 round_nearest(VecF x) {
  const VecU32 bits = bits_of(x);
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
// Toward zero or away from it, with the probability that makes the mean right.
TORCHWELD_INLINE VecU32 round_stochastic(VecF x, VecU32 random16) {
  return bits_of(x) + (x == x ? random16 : VecU32{});
}

template <AdamWRounding kRounding>
inline constexpr bool kCompensated =
    kRounding == AdamWRounding::kahan || kRounding == AdamWRounding::split;

// A bfloat16 parameter and its compensation, each in the upper half of a lane.
template <AdamWRounding kRounding>
struct Weight16 {
  VecU32 param, compensation;

  TORCHWELD_INLINE VecF value() const {
    if constexpr (kRounding == AdamWRounding::kahan) {
      return float_of(param) + float_of(compensation);
    } else if constexpr (kRounding == AdamWRounding::split) {
      const VecU32 master = param + (VecU32)((VecI32)compensation >> 16);
      // Beside a zero the user has put there, what is left of the old weight would carry into the
      // sign, and make a NaN.
      return float_of((VecI32)(master ^ param) >= 0 ? master : param);
    } else {
      return float_of(param);
    }
  }

  // The lower halves are for the caller to drop.
  TORCHWELD_INLINE static Weight16 of(VecF x, VecU32 random16) {
    if constexpr (kRounding == AdamWRounding::kahan) {
      const VecU32 rounded = round_nearest(x);
      const VecF rest = x - float_of(rounded & 0xffff0000u);
      return {rounded, round_stochastic(rest, random16)};
    } else if constexpr (kRounding == AdamWRounding::split) {
      // A NaN with a full payload would carry into the sign.
      const VecU32 bits = x == x ? bits_of(x) : broadcast<VecU32>(0x7fc00000u);
      return {bits + 0x8000u, bits << 16};
    } else if constexpr (kRounding == AdamWRounding::stochastic) {
      return {round_stochastic(x, random16), VecU32{}};
    } else {
      return {round_nearest(x), VecU32{}};
    }
  }
};

// --- int8 states ---------------------------------------------------------------------------------
// The minifloats of kernels/adamw.h, by shifts of float bits: no table, no search, no subnormal
// numbers. A magnitude is scaled to [0, top - 2] and 2 is added. From 2 on, floats have exponents
// 128, 129, ..., so the exponent's low bits and three of the mantissa are the code, and the other
// 20 say how far it is to the next: adding 20 random bits rounds stochastically, half to nearest.
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

  // `byte`: the code in the lower 8 bits, above them its sign. `unit`: scale / kRange.
  TORCHWELD_INLINE static VecF decode(VecU32 byte, VecF unit) {
    const VecU32 bits = byte << kCodeShift;  // the sign in bit 31
    const VecU32 zero_bits = broadcast<VecU32>(kCodeZeroBits);
    const VecU32 code = broadcast<VecU32>(0x7fu << kCodeShift);
    const VecF magnitude =
        fma(float_of(select_bits(code, bits, zero_bits)), unit, -kCodeZero * unit);
    return float_of(select_bits(broadcast<VecU32>(0x80000000u), bits, bits_of(magnitude)));
  }

  // The code, in the lower 8 bits. `inverse`: kRange / scale; `random` has 20 bits. What is above
  // the scale gets the top code, so that a rounding error of the scale cannot carry into the sign;
  // so does NaN.
  TORCHWELD_INLINE static VecU32 encode(VecF x, VecF inverse, VecU32 random) {
    const VecF magnitude = float_of(bits_of(x) & 0x7fffffffu);
    const VecF y = min(fma(magnitude, inverse, broadcast<VecF>(kCodeZero)), broadcast<VecF>(kTop));
    const VecU32 code = (bits_of(y) + random) >> kCodeShift;
    return select_bits(broadcast<VecU32>(0x7fu), code, bits_of(x) >> 24);
  }
};

struct ExpAvgSqCodec {
  static constexpr float kTop = 0x1.ep32f;
  static constexpr float kRange = kTop - kCodeZero;
  static constexpr float kLeastScale = 0x1p-90f;

  // `byte`: the code, and above it zeros.
  TORCHWELD_INLINE static VecF decode(VecU32 byte, VecF unit) {
    return fma(float_of((byte << kCodeShift) | kCodeZeroBits), unit, -kCodeZero * unit);
  }

  // No code below that of `least`, which is kCodeZero or kCodeOne.
  TORCHWELD_INLINE static VecU32 encode(VecF x, VecF inverse, VecU32 random, VecF least) {
    const VecF y = min(fma(x, inverse, broadcast<VecF>(kCodeZero)), broadcast<VecF>(kTop));
    return (bits_of(max(y, least)) + random) >> kCodeShift;
  }
};

// NaN stays.
TORCHWELD_INLINE float at_least(float x, float least) { return x < least ? least : x; }

// The scales of a block after a step, and what the step of its elements needs.
struct BlockScales {
  float m, v;
  float m_decode, v_decode;  // units of the codes before, with the decay of the moments
  float m_encode, v_encode;
  float v_least;
};

struct ScaleStep {
  TORCHWELD_INLINE explicit ScaleStep(const AdamWScalars& s)
      : beta1((float)s.beta1),
        beta2((float)s.beta2),
        c1((float)(1.0 - s.beta1)),
        c2((float)(1.0 - s.beta2)),
        grad_scale((float)(s.grad_scale < 0 ? -s.grad_scale : s.grad_scale)) {}

  float beta1, beta2, c1, c2, grad_scale;

  // `peak`: the largest magnitude among the gradients of the block.
  TORCHWELD_INLINE BlockScales update(float m_old, float v_old, float peak) const {
    const float largest = peak * grad_scale;
    const float m = at_least(beta1 * m_old + c1 * largest, ExpAvgCodec::kLeastScale);
    // A square that overflows stays the business of its own element.
    float v = at_least(beta2 * v_old + c2 * largest * largest, ExpAvgSqCodec::kLeastScale);
    if (v > kFloatMax) v = kFloatMax;
    return {.m = m,
            .v = v,
            .m_decode = m_old * (beta1 / ExpAvgCodec::kRange),
            .v_decode = v_old * (beta2 / ExpAvgSqCodec::kRange),
            .m_encode = ExpAvgCodec::kRange / m,
            .v_encode = ExpAvgSqCodec::kRange / v,
            // v = 0 beside m != 0 would make the next update explode; a block of zeros stays one.
            .v_least = m > ExpAvgCodec::kLeastScale ? kCodeOne : kCodeZero};
  }

  static constexpr float kFloatMax = 0x1.fffffep127f;
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
