// What the AdamW steps with states of fewer bits share on a CPU: the random bits and 16-bit
// parameters by registers. All of it is a function of one element and its index, so that no cut of
// a tensor and no register width changes a bit.
#pragma once

#include "kernels/adamw_math.h"
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

// Random bits of consecutive elements.
class Random {
 public:
  using Bits = RandomBits;

  // Lane l of the first register is element index + l * lane_step.
  Random(uint64_t key, int64_t index, int lane_step = 1)
      : middle_(broadcast<VecU32>((uint32_t)(key >> 32))) {
    for (int lane = 0; lane < kLanesF; ++lane) {
      counter_[lane] =
          ((uint32_t)index + (uint32_t)(lane * lane_step)) * Bits::kWeyl + (uint32_t)key;
    }
  }

  // Of these elements; afterwards the lanes are `step` elements further.
  Bits next(int step = kLanesF) {
    const VecU32 counter = counter_;
    counter_ += Bits::kWeyl * (uint32_t)step;
    return Bits::of(counter, middle_);
  }

 private:
  VecU32 counter_, middle_;
};

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
