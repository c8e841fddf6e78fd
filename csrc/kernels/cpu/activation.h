// Activations on registers: value and derivative, with torch's values at the borders and for NaN.
#pragma once

#include "kernels/conv_bn_relu.h"
#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// e^x within 1 ulp or so: x = n ln 2 + r with |r| <= ln(2) / 2, the Taylor series of e^r up to r^7
// (its remainder is below 1e-8), and 2^n in two factors so that subnormal results and the way to
// infinity come out right. NaN stays NaN.
inline VecF exp(VecF x) {
  const VecF low = broadcast<VecF>(-104.0f), high = broadcast<VecF>(89.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const VecF magic = broadcast<VecF>(12582912.0f);
  const VecF shifted = fma(x, broadcast<VecF>(1.44269504f), magic);
  const VecF n = shifted - magic;
  VecF r = fma(n, broadcast<VecF>(-0.693359375f), x);  // ln 2, the first 10 bits: an exact product
  r = fma(n, broadcast<VecF>(2.12194440e-4f), r);      // and the rest of it
  VecF p = broadcast<VecF>(1.0f / 5040);
  p = fma(p, r, broadcast<VecF>(1.0f / 720));
  p = fma(p, r, broadcast<VecF>(1.0f / 120));
  p = fma(p, r, broadcast<VecF>(1.0f / 24));
  p = fma(p, r, broadcast<VecF>(1.0f / 6));
  p = fma(p, r, broadcast<VecF>(0.5f));
  p = fma(p, r, broadcast<VecF>(1.0f));
  p = fma(p, r, broadcast<VecF>(1.0f));
  const VecI32 exponent = (VecI32)shifted - (VecI32)magic;
  const VecI32 half = exponent >> 1;
  const VecF scale = (VecF)((half + 127) << 23);
  const VecF rest = (VecF)((exponent - half + 127) << 23);
  return p * scale * rest;
}

inline VecD exp(VecD x) {
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
      return (z > zero) & (z < six) ? g : zero;
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
