// A look at what an AdamW step did, over elements still in cache, so that the steps stay plain.
#include "kernels/cpu/adamw_low_bit.h"
#include "kernels/cpu/adamw_sums.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

template <class T>
using Mask = typename Math<T>::Mask;

// Where a moment is not zero.
template <class T, class M>
Mask<T> nonzero(const M* moment) {
  if constexpr (sizeof(M) == 1) {
    VecI8 codes;
    memcpy(&codes, moment, sizeof codes);
    return (widen(codes) & 0x7f) != 0;
  } else {
    return load(moment) != 0;
  }
}

template <class T, class M, AdamWRounding kRounding>
class Observation {
 public:
  using Vec = typename Math<T>::Vec;
  using Scalar = typename Math<T>::Scalar;
  static constexpr int64_t kLanes = Math<T>::kLanes;
  static constexpr int64_t kSize = SquareSums<T>::kSize;

  struct Data {
    Weights<T, kRounding> after, before;
    const T* g;
    const M* m;
    Scalar* ema;
    BFloat16* copy;
  };

  Observation(const AdamWScalars& s, double ema_weight)
      : ema_weight_(broadcast<Vec>((Scalar)ema_weight)),
        steps_(broadcast<Mask<T>>(s.step_size != 0 ? -1 : 0)),
        decays_(broadcast<Mask<T>>(s.decay != 1 ? -1 : 0)) {}

  // kSize elements from `begin` on.
  void look(const Data& d, int64_t begin) {
    for (int r = 0; r < SquareSums<T>::kRegisters; ++r) {
      const int64_t i = begin + r * kLanes;
      const Vec after = d.after.load_at(i), before = d.before.load_at(i);
      update_squares_.add_difference(r, after, before);
      const Mask<T> moves = (nonzero<T>(d.m + i) & steps_) | ((after != 0) & decays_);
      lost_ -= (after == before) & moves;
      const Vec g = load(d.g + i);
      const Vec zero_or_nan = g - g;
      nonfinite_ -= zero_or_nan != zero_or_nan;
      if (d.ema != nullptr) {
        const Vec ema = load(d.ema + i);
        store(d.ema + i, fma(ema_weight_, after - ema, ema));
      }
      if constexpr (sizeof(Scalar) == 4) {
        if (d.copy != nullptr) store(d.copy + i, after);
      }
    }
  }

  // The last elements, fewer than kSize, through zero-padded copies.
  void look_last(const Data& d, int64_t begin, int64_t count) {
    T after[kSize] = {}, before[kSize] = {}, g[kSize] = {};
    uint16_t after16[kSize] = {}, before16[kSize] = {};
    M m[kSize] = {};
    Scalar ema[kSize] = {};
    BFloat16 copy[kSize] = {};
    const size_t n = (size_t)count;
    memcpy(after, d.after.param + begin, n * sizeof(T));
    memcpy(before, d.before.param + begin, n * sizeof(T));
    memcpy(g, d.g + begin, n * sizeof(T));
    memcpy(m, d.m + begin, n * sizeof(M));
    if (d.after.compensation) memcpy(after16, d.after.compensation + begin, n * 2);
    if (d.before.compensation) memcpy(before16, d.before.compensation + begin, n * 2);
    if (d.ema) memcpy(ema, d.ema + begin, n * sizeof(Scalar));
    look({{after, after16}, {before, before16}, g, m, ema, copy}, 0);
    if (d.ema) memcpy(d.ema + begin, ema, n * sizeof(Scalar));
    if (d.copy) memcpy(d.copy + begin, copy, n * sizeof(BFloat16));
  }

  void add_to(AdamWStatistics* statistics) const {
    statistics->update_squares += update_squares_.total();
    for (int lane = 0; lane < kLanes; ++lane) {
      statistics->lost += lost_[lane];
      statistics->nonfinite += nonfinite_[lane];
    }
  }

 private:
  Vec ema_weight_;
  Mask<T> steps_, decays_;  // all ones where the moments, and the decay, move a weight
  Mask<T> lost_ = {}, nonfinite_ = {};
  SquareSums<T> update_squares_;
};

}  // namespace

template <class T, class M, AdamWRounding kRounding>
void adamw_observe(const AdamWSpan& span, const AdamWScalars& scalars,
                   const AdamWObserver& observer, AdamWStatistics* statistics) {
  using Look = Observation<T, M, kRounding>;
  Look look(scalars, observer.ema_weight);
  const typename Look::Data data{
      {(T*)span.param, (uint16_t*)span.compensation},
      {(T*)observer.param_before, (uint16_t*)observer.compensation_before},
      (const T*)span.grad,
      (const M*)span.exp_avg,
      (typename Look::Scalar*)observer.ema,
      observer.bfloat16};
  int64_t i = 0;
  for (; i + Look::kSize <= span.size; i += Look::kSize) look.look(data, i);
  if (i < span.size) look.look_last(data, i, span.size - i);
  look.add_to(statistics);
}

#define TORCHWELD_OBSERVE(T, M, rounding)                     \
  template void adamw_observe<T, M, AdamWRounding::rounding>( \
      const AdamWSpan&, const AdamWScalars&, const AdamWObserver&, AdamWStatistics*);

TORCHWELD_OBSERVE(double, double, nearest)
TORCHWELD_OBSERVE(float, float, nearest)
TORCHWELD_OBSERVE(float, BFloat16, nearest)
TORCHWELD_OBSERVE(float, uint8_t, nearest)
TORCHWELD_OBSERVE(Float16, Float16, nearest)
TORCHWELD_OBSERVE(Float16, BFloat16, nearest)
TORCHWELD_OBSERVE(Float16, uint8_t, nearest)
TORCHWELD_OBSERVE(BFloat16, BFloat16, nearest)
TORCHWELD_OBSERVE(BFloat16, BFloat16, kahan)
TORCHWELD_OBSERVE(BFloat16, BFloat16, split)
TORCHWELD_OBSERVE(BFloat16, uint8_t, nearest)
TORCHWELD_OBSERVE(BFloat16, uint8_t, kahan)
TORCHWELD_OBSERVE(BFloat16, uint8_t, split)

#undef TORCHWELD_OBSERVE

}  // namespace torchweld::kernels::TORCHWELD_ISA
