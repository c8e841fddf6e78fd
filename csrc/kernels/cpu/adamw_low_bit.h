// What the AdamW steps with states of fewer bits share: the formula, the random bits, and 16-bit
// parameters. All of it is a function of one element and its index, so that no cut of a tensor and
// no register width changes a bit.
#pragma once

#include "kernels/adamw.h"
#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {

// The kernels of adamw_bfloat16.cpp, adamw_int8.cpp and adamw_observe.cpp, for adamw.cpp's table.
template <class T, AdamWRounding kRounding>
void adamw_step_bfloat16(const AdamWSpan& span, const AdamWScalars& scalars);

template <class T, AdamWRounding kRounding>
void adamw_step_int8(const AdamWSpan& span, const AdamWScalars& scalars);
void encode_exp_avg(const float* values, int64_t size, uint8_t* codes, float* scales);
void encode_exp_avg_sq(const float* values, int64_t size, uint8_t* codes, float* scales);
void decode_exp_avg(const uint8_t* codes, const float* scales, int64_t size, float* values);
void decode_exp_avg_sq(const uint8_t* codes, const float* scales, int64_t size, float* values);

// M: how a moment is stored. After a stochastically rounded step as after a nearest one.
template <class T, class M, AdamWRounding kRounding>
void adamw_observe(const AdamWSpan& span, const AdamWScalars& scalars,
                   const AdamWObserver& observer, AdamWStatistics* statistics);

// The formula in float, with one division: there are no bits of torch's to match here.
struct LowBitStep {
  explicit LowBitStep(const AdamWScalars& s)
      : decay(broadcast<VecF>((float)s.decay)),
        grad_scale(broadcast<VecF>((float)s.grad_scale)),
        c1(broadcast<VecF>((float)(1.0 - s.beta1))),
        c2(broadcast<VecF>((float)(1.0 - s.beta2))),
        step_size(broadcast<VecF>((float)-s.step_size)),
        inverse_root(broadcast<VecF>((float)(1.0 / s.bias_root))),
        eps(broadcast<VecF>((float)s.eps)) {}

  VecF decay, grad_scale, c1, c2, step_size, inverse_root, eps;

  // `m` and `v` arrive multiplied by beta1 and beta2.
  void moments(VecF g, VecF& m, VecF& v) const {
    g = g * grad_scale;
    m = fma(c1, g, m);
    v = fma(c2 * g, g, v);
  }

  VecF weight(VecF p, VecF m, VecF v) const {
    return fma(p, decay, (step_size * m) / fma(sqrt(v), inverse_root, eps));
  }
};

// 32 random bits an element, counted by its index: a Weyl sequence through the rounds of Chris
// Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/), one half of the key before them
// and one between.
class Random {
 public:
  // Lane l of the first register is element index + l * lane_step.
  Random(uint64_t key, int64_t index, int lane_step = 1)
      : middle_(broadcast<VecU32>((uint32_t)(key >> 32))) {
    for (int lane = 0; lane < kLanesF; ++lane) {
      counter_[lane] = ((uint32_t)index + (uint32_t)(lane * lane_step)) * kWeyl + (uint32_t)key;
    }
  }

  struct Bits {
    VecU32 word;
    // For the moments. What the 20 bits share is the least of the upper, and of no weight.
    VecU32 low20() const { return word & 0xfffffu; }
    VecU32 high20() const { return word >> 12; }
    VecU32 low16() const { return word & 0xffffu; }
    VecU32 high16() const { return word >> 16; }
    // For the parameter.
    VecU32 other16() const { return (word * kWeyl) >> 16; }
  };

  // Of these elements; afterwards the lanes are `step` elements further.
  Bits next(int step = kLanesF) {
    VecU32 x = counter_;
    counter_ += kWeyl * (uint32_t)step;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= (x >> 15) ^ middle_;
    x *= 0x846ca68bu;
    return {x ^ (x >> 16)};
  }

 private:
  static constexpr uint32_t kWeyl = 0x9e3779b1u;  // 2^32 over the golden ratio
  VecU32 counter_, middle_;
};

// A float rounded to bfloat16, in the upper half; the lower is for the caller to drop. NaN stays.
inline VecU32 round_nearest(VecF x) {
  const VecU32 bits = (VecU32)x;
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
}
// Toward zero or away from it, with the probability that makes the mean right.
inline VecU32 round_stochastic(VecF x, VecU32 random16) {
  return (VecU32)x + ((VecU32)(x == x) & random16);
}

// A bfloat16 parameter and its compensation, each in the upper half of a lane.
template <AdamWRounding kRounding>
struct Weight16 {
  VecU32 param, compensation;

  VecF value() const {
    if constexpr (kRounding == AdamWRounding::kahan) {
      return (VecF)param + (VecF)compensation;
    } else if constexpr (kRounding == AdamWRounding::split) {
      const VecU32 master = param + (VecU32)((VecI32)compensation >> 16);
      // Beside a zero the user has put there, what is left of the old weight would carry into the
      // sign, and make a NaN.
      const VecI32 fits = (VecI32)(master ^ param) >= 0;
      return (VecF)(fits ? master : param);
    } else {
      return (VecF)param;
    }
  }

  // The lower halves are for the caller to drop.
  static Weight16 of(VecF x, VecU32 random16) {
    if constexpr (kRounding == AdamWRounding::kahan) {
      const VecU32 rounded = round_nearest(x);
      const VecF rest = x - (VecF)(rounded & 0xffff0000u);
      return {rounded, round_stochastic(rest, random16)};
    } else if constexpr (kRounding == AdamWRounding::split) {
      // A NaN with a full payload would carry into the sign.
      const VecU32 bits = x == x ? (VecU32)x : broadcast<VecU32>(0x7fc00000u);
      return {bits + 0x8000u, bits << 16};
    } else if constexpr (kRounding == AdamWRounding::stochastic) {
      return {round_stochastic(x, random16), VecU32{}};
    } else {
      return {round_nearest(x), VecU32{}};
    }
  }
};

template <AdamWRounding kRounding>
inline constexpr bool kCompensated =
    kRounding == AdamWRounding::kahan || kRounding == AdamWRounding::split;

// Parameters as the step sees them, in float whatever they are stored in.
template <class T, AdamWRounding kRounding>
struct Weights {
  T* param;
  uint16_t* compensation;

  typename Math<T>::Vec load_at(int64_t i) const { return load(param + i); }
  void store_at(int64_t i, typename Math<T>::Vec x, Random::Bits) const { store(param + i, x); }
};

template <AdamWRounding kRounding>
struct Weights<BFloat16, kRounding> {
  BFloat16* param;
  uint16_t* compensation;

  VecF load_at(int64_t i) const {
    Weight16<kRounding> w{load_upper(param + i), VecU32{}};
    if constexpr (kCompensated<kRounding>) w.compensation = load_upper(compensation + i);
    return w.value();
  }
  void store_at(int64_t i, VecF x, Random::Bits random) const {
    const auto w = Weight16<kRounding>::of(x, random.other16());
    store_upper(param + i, w.param);
    if constexpr (kCompensated<kRounding>) store_upper(compensation + i, w.compensation);
  }

  static VecU32 load_upper(const void* p) {
    VecU16 bits;
    memcpy(&bits, p, sizeof bits);
    return widen(bits) << 16;
  }
  static void store_upper(void* p, VecU32 x) {
    const VecU16 bits = narrow(x >> 16);
    memcpy(p, &bits, sizeof bits);
  }
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
