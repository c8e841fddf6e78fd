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
// and one between. Moments and parameter draw 16 bits each.
class Random {
 public:
  Random(uint64_t key, int64_t index) : middle_(broadcast<VecU32>((uint32_t)(key >> 32))) {
    for (int lane = 0; lane < kLanesF; ++lane) {
      counter_[lane] = ((uint32_t)index + (uint32_t)lane) * kWeyl + (uint32_t)key;
    }
  }

  // The next register of elements.
  void next() {
    VecU32 x = counter_;
    counter_ += kWeyl * (uint32_t)kLanesF;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= (x >> 15) ^ middle_;
    x *= 0x846ca68bu;
    bits_ = x ^ (x >> 16);
  }

  // For the moments. What the two share are the least of the upper bits, and of no weight.
  VecU32 low20() const { return bits_ & 0xfffffu; }
  VecU32 high20() const { return bits_ >> 12; }
  VecU32 low16() const { return bits_ & 0xffffu; }
  VecU32 high16() const { return bits_ >> 16; }
  // For the parameter.
  VecU32 other16() const { return (bits_ * kWeyl) >> 16; }

 private:
  static constexpr uint32_t kWeyl = 0x9e3779b1u;  // 2^32 over the golden ratio
  VecU32 counter_, middle_, bits_;
};

// Rounds toward zero or away from it, with the probability that makes the mean right. NaN stays.
inline void store_stochastic(BFloat16* p, VecF x, VecU32 random16) {
  const VecU32 add = (VecU32)(x == x) & random16;
  const VecU16 bits = narrow(((VecU32)x + add) >> 16);
  memcpy(p, &bits, sizeof bits);
}

inline VecU32 load_bits(const void* p) {
  VecU16 bits;
  memcpy(&bits, p, sizeof bits);
  return widen(bits);
}

// A parameter as the step sees it: in float, whatever it is stored in.
template <class T, AdamWRounding kRounding>
struct Weights {
  T* param;
  uint16_t* compensation;

  typename Math<T>::Vec load_at(int64_t i) const {
    if constexpr (kRounding == AdamWRounding::kahan) {
      return load(param + i) + load((const BFloat16*)compensation + i);
    } else if constexpr (kRounding == AdamWRounding::split) {
      const VecI32 low = (VecI32)(load_bits(compensation + i) << 16) >> 16;
      return (VecF)((load_bits(param + i) << 16) + (VecU32)low);
    } else {
      return load(param + i);
    }
  }

  void store_at(int64_t i, VecF x, const Random& random) const {
    if constexpr (kRounding == AdamWRounding::stochastic) {
      store_stochastic(param + i, x, random.other16());
    } else if constexpr (kRounding == AdamWRounding::kahan) {
      const VecU16 rounded = from_float(x, BFloat16{});
      memcpy(param + i, &rounded, sizeof rounded);
      store_stochastic((BFloat16*)compensation + i, x - to_float(rounded, BFloat16{}),
                       random.other16());
    } else if constexpr (kRounding == AdamWRounding::split) {
      // A NaN with a full payload would carry into the sign.
      const VecU32 bits = x == x ? (VecU32)x : broadcast<VecU32>(0x7fc00000u);
      const VecU16 high = narrow((bits + 0x8000u) >> 16);
      const VecU16 low = narrow(bits & 0xffffu);
      memcpy(param + i, &high, sizeof high);
      memcpy(compensation + i, &low, sizeof low);
    } else {
      store(param + i, x);
    }
  }
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
