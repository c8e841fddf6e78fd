// What a step kernel sees of its elements while they are in registers, as
// kernels/cpu/adamw_observe.cpp. Statistics are added up in an order of their own, fixed all the
// same.
#pragma once

#include "kernels/cuda/adamw_chunk.h"

namespace torchweld::kernels::cuda {

// The sum of all threads of a block, in thread 0.
template <class T>
TORCHWELD_INLINE T sum_of_block(T value) {
  constexpr int kWarp = 32;
  __shared__ T warps[32];
  __syncthreads();  // the sum before this one may still be read
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  }
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = 0;
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += warps[warp];
  }
  return total;
}

// Of the elements of one thread, kCount at a time.
template <class T, int kCount>
class Observation {
 public:
  using Vec = typename Math<T>::Vec;

  TORCHWELD_INLINE Observation(const AdamWStepParams& params, const StepWork& work)
      : average_weight_(static_cast<Vec>(params.average_weight)),
        average_(static_cast<Vec*>(work.tensor->average)),
        copy_(work.tensor->bfloat16_weight),
        steps_(work.scalars->step_size != 0),
        decays_(work.scalars->decay != 1) {}

  // The elements from `i` on, of which the first `count` exist.
  TORCHWELD_INLINE void begin(int64_t i, int count) {
    place_ = i;
    count_ = count;
    if (average_ != nullptr) load_group(average_ + i, count, averages_);
  }

  TORCHWELD_INLINE void see(int j, Vec before, Vec after, T grad, bool has_moment) {
    if (j >= count_) return;
    const double update = static_cast<double>(after) - static_cast<double>(before);
    update_squares_ = fma(update, update, update_squares_);
    lost_ += after == before && ((has_moment && steps_) || (after != 0 && decays_));
    const Vec g = to_vec(grad), zero_or_nan = g - g;
    nonfinite_ += zero_or_nan != zero_or_nan;
    if (average_ != nullptr)
      averages_[j] = fma(average_weight_, after - averages_[j], averages_[j]);
    if constexpr (sizeof(Vec) == sizeof(float)) {
      if (copy_ != nullptr) copy_[place_ + j] = from_vec<BFloat16>(after);
    }
  }

  TORCHWELD_INLINE void end() const {
    if (average_ != nullptr) store_group(average_ + place_, count_, averages_);
  }

  // For all threads of a block, after their last element.
  TORCHWELD_INLINE void write(AdamWStatistics* statistics) const {
    const AdamWStatistics sums{sum_of_block(update_squares_), sum_of_block<int64_t>(lost_),
                               sum_of_block<int64_t>(nonfinite_)};
    if (threadIdx.x == 0) *statistics = sums;
  }

 private:
  Vec average_weight_;
  Vec* average_;
  BFloat16* copy_;
  bool steps_, decays_;  // whether moments, and the decay, move a weight
  double update_squares_ = 0;
  int lost_ = 0, nonfinite_ = 0;
  int64_t place_ = 0;
  int count_ = 0;
  Vec averages_[kCount] = {};
};

}  // namespace torchweld::kernels::cuda
