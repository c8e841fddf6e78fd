// Activations on registers: value and derivative, with torch's values at the borders and for NaN.
#pragma once

#include "kernels/conv_bn_relu.h"
#include "kernels/vec_math.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// libm: the double path is there for checks, not for speed.
static inline VecD exp(VecD x) {
  VecD r;
  for (int i = 0; i < kLanesD; ++i) r[i] = __builtin_exp(x[i]);
  return r;
}

// value(z), and gradient(g, z) = g * value'(z).
template <Activation kActivation, class Vec>
struct Activate {
  Vec negative_slope;

  Vec value(Vec z) const {
    const Vec zero{}, one = zero + 1, six = zero + 6;
    if constexpr (kActivation == Activation::relu) {
      return z <= zero ? zero : z;
    } else if constexpr (kActivation == Activation::relu6) {
      return clamp(z, six);
    } else if constexpr (kActivation == Activation::leaky_relu) {
      return z > zero ? z : z * negative_slope;
    } else if constexpr (kActivation == Activation::silu) {
      return z / (one + exp(-z));
    } else if constexpr (kActivation == Activation::hardswish) {
      return z * clamp(z + 3, six) / six;
    } else {
      return z;
    }
  }

  Vec gradient(Vec g, Vec z) const {
    const Vec zero{}, one = zero + 1, three = zero + 3, six = zero + 6;
    if constexpr (kActivation == Activation::relu) {
      return z <= zero ? zero : g;
    } else if constexpr (kActivation == Activation::relu6) {
      return ((z > zero) & (z < six)) ? g : zero;
    } else if constexpr (kActivation == Activation::leaky_relu) {
      return z > zero ? g : g * negative_slope;
    } else if constexpr (kActivation == Activation::silu) {
      const Vec sigmoid = one / (one + exp(-z));
      return g * sigmoid * (one + z * (one - sigmoid));
    } else if constexpr (kActivation == Activation::hardswish) {
      const Vec inside = z >= three ? g : g * (z / three + (float)0.5);
      return z <= -three ? zero : inside;
    } else {
      return g;
    }
  }

 private:
  // Into [0, high]; NaN stays NaN.
  static Vec clamp(Vec z, Vec high) {
    const Vec zero{};
    z = z < zero ? zero : z;
    return z > high ? high : z;
  }
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
