// The arithmetic of conv_bn_relu, once for every instruction set and for CUDA: activations, and the
// merging of statistics.
#pragma once

#include "kernels/conv_bn_relu.h"

#include "kernels/vec_math.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// exp_of<T>(x) and quotient<T>(a, b) are as accurate as storage type T needs them; those of float32
// have the same bits everywhere.
#if defined(TORCHWELD_LANE)
TORCHWELD_INLINE VecD exp(VecD x) { return ::exp(x); }
template <class T>
TORCHWELD_INLINE typename Math<T>::Vec exp_of(typename Math<T>::Vec x) {
  if constexpr (sizeof(T) == 2) {
    return __expf(x);  // relative error below 2^-16
  } else {
    return exp(x);
  }
}
template <class T>
TORCHWELD_INLINE typename Math<T>::Vec quotient(typename Math<T>::Vec a, typename Math<T>::Vec b) {
  if constexpr (sizeof(T) == 2) {
    return __fdividef(a, b);
  } else {
    return a / b;
  }
}
#else
// libm: the double path is there for checks, not for speed.
static inline VecD exp(VecD x) {
  VecD r;
  for (int i = 0; i < kLanesD; ++i) r[i] = __builtin_exp(x[i]);
  return r;
}
template <class T>
inline typename Math<T>::Vec exp_of(typename Math<T>::Vec x) {
  return exp(x);
}
template <class T>
inline typename Math<T>::Vec quotient(typename Math<T>::Vec a, typename Math<T>::Vec b) {
  return a / b;
}
#endif

// value(z), and gradient(g, z) = g * value'(z), with torch's values at the borders and for NaN.
template <Activation kActivation, class T>
struct Activate {
  using Vec = typename Math<T>::Vec;
  Vec negative_slope;

  TORCHWELD_INLINE Vec value(Vec z) const {
    const Vec zero{}, one = zero + 1, six = zero + 6;
    if constexpr (kActivation == Activation::relu) {
      return z <= zero ? zero : z;
    } else if constexpr (kActivation == Activation::relu6) {
      return clamp(z, six);
    } else if constexpr (kActivation == Activation::leaky_relu) {
      return z > zero ? z : z * negative_slope;
    } else if constexpr (kActivation == Activation::silu) {
      return quotient<T>(z, one + exp_of<T>(-z));
    } else if constexpr (kActivation == Activation::hardswish) {
      return quotient<T>(z * clamp(z + 3, six), six);
    } else {
      return z;
    }
  }

  TORCHWELD_INLINE Vec gradient(Vec g, Vec z) const {
    const Vec zero{}, one = zero + 1, three = zero + 3, six = zero + 6;
    if constexpr (kActivation == Activation::relu) {
      return z <= zero ? zero : g;
    } else if constexpr (kActivation == Activation::relu6) {
      return ((z > zero) & (z < six)) ? g : zero;
    } else if constexpr (kActivation == Activation::leaky_relu) {
      return z > zero ? g : g * negative_slope;
    } else if constexpr (kActivation == Activation::silu) {
      const Vec sigmoid = quotient<T>(one, one + exp_of<T>(-z));
      return g * sigmoid * (one + z * (one - sigmoid));
    } else if constexpr (kActivation == Activation::hardswish) {
      const Vec inside = z >= three ? g : g * (quotient<T>(z, three) + (float)0.5);
      return z <= -three ? zero : inside;
    } else {
      return g;
    }
  }

 private:
  // Into [0, high]; NaN stays NaN.
  TORCHWELD_INLINE static Vec clamp(Vec z, Vec high) {
    const Vec zero{};
    z = z < zero ? zero : z;
    return z > high ? high : z;
  }
};

// Adds `size` values per column to the statistics of `count` others, by Chan's formula (Chan,
// Golub, LeVeque 1979). The sums are of deviations from a center in the arithmetic type and of
// their squares; what the center misses of the values' mean, their sum knows.
struct Merge {
  double count, size;
  double inverse = 1 / size;
  double weight = size / (count + size);

  template <class V>
  TORCHWELD_INLINE void operator()(V center, V deviations, V squares, V& mean, V& m2) const {
    const V zero{};
    const V inside = squares - deviations * deviations * inverse;
    const V delta = center + deviations * inverse - mean;
    mean += delta * weight;
    m2 += (inside < zero ? zero : inside) + delta * delta * (count * weight);
  }
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
