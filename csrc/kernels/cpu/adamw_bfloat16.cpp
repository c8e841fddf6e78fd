// The AdamW step with bfloat16 moments, stochastically rounded.
#include "kernels/cpu/adamw_low_bit.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

template <class T, AdamWRounding kRounding, bool kAmsgrad>
struct Span {
  static constexpr int64_t kLanes = kLanesF;
  Weights<T, kRounding> weights;
  const T* g;
  BFloat16* m;
  BFloat16* v;
  BFloat16* v_max;

  void update_at(int64_t i, const LowBitStep& step, VecF beta1, VecF beta2, Random& random) const {
    random.next();
    VecF mv = load(m + i) * beta1, vv = load(v + i) * beta2;
    step.moments(load(g + i), mv, vv);
    VecF second = vv;
    if constexpr (kAmsgrad) {
      // Nearest: a maximum does not build up, so neither does its rounding error. NaN wins.
      const VecF old = load(v_max + i);
      second = ((old > vv) | (old != old)) ? old : vv;
      store(v_max + i, second);
    }
    weights.store_at(i, step.weight(weights.load_at(i), mv, second), random);
    store_stochastic(m + i, mv, random.low16());
    store_stochastic(v + i, vv, random.high16());
  }

  // The last elements, fewer than a register holds, through zero-padded copies.
  void update_last(int64_t begin, int64_t count, const LowBitStep& step, VecF beta1, VecF beta2,
                   Random& random) const {
    T p_copy[kLanes] = {}, g_copy[kLanes] = {};
    uint16_t c_copy[kLanes] = {};
    BFloat16 m_copy[kLanes] = {}, v_copy[kLanes] = {}, x_copy[kLanes] = {};
    const size_t bytes = (size_t)count * sizeof(T), bytes16 = (size_t)count * 2;
    memcpy(p_copy, weights.param + begin, bytes);
    memcpy(g_copy, g + begin, bytes);
    memcpy(m_copy, m + begin, bytes16);
    memcpy(v_copy, v + begin, bytes16);
    if (weights.compensation) memcpy(c_copy, weights.compensation + begin, bytes16);
    if constexpr (kAmsgrad) memcpy(x_copy, v_max + begin, bytes16);
    Span{{p_copy, c_copy}, g_copy, m_copy, v_copy, x_copy}.update_at(0, step, beta1, beta2, random);
    memcpy(weights.param + begin, p_copy, bytes);
    memcpy(m + begin, m_copy, bytes16);
    memcpy(v + begin, v_copy, bytes16);
    if (weights.compensation) memcpy(weights.compensation + begin, c_copy, bytes16);
    if constexpr (kAmsgrad) memcpy(v_max + begin, x_copy, bytes16);
  }
};

template <class T, AdamWRounding kRounding, bool kAmsgrad>
void run(const AdamWSpan& s, const AdamWScalars& scalars) {
  const Span<T, kRounding, kAmsgrad> span{{(T*)s.param, (uint16_t*)s.compensation},
                                          (const T*)s.grad,
                                          (BFloat16*)s.exp_avg,
                                          (BFloat16*)s.exp_avg_sq,
                                          (BFloat16*)s.max_exp_avg_sq};
  const LowBitStep step(scalars);
  const VecF beta1 = broadcast<VecF>((float)scalars.beta1);
  const VecF beta2 = broadcast<VecF>((float)scalars.beta2);
  Random random(scalars.key, s.index);
  int64_t i = 0;
  for (; i + kLanesF <= s.size; i += kLanesF) span.update_at(i, step, beta1, beta2, random);
  if (i < s.size) span.update_last(i, s.size - i, step, beta1, beta2, random);
}

}  // namespace

template <class T, AdamWRounding kRounding>
void adamw_step_bfloat16(const AdamWSpan& span, const AdamWScalars& scalars) {
  span.max_exp_avg_sq != nullptr ? run<T, kRounding, true>(span, scalars)
                                 : run<T, kRounding, false>(span, scalars);
}

template void adamw_step_bfloat16<float, AdamWRounding::nearest>(const AdamWSpan&,
                                                                 const AdamWScalars&);
template void adamw_step_bfloat16<Float16, AdamWRounding::nearest>(const AdamWSpan&,
                                                                   const AdamWScalars&);
template void adamw_step_bfloat16<BFloat16, AdamWRounding::nearest>(const AdamWSpan&,
                                                                    const AdamWScalars&);
template void adamw_step_bfloat16<BFloat16, AdamWRounding::stochastic>(const AdamWSpan&,
                                                                       const AdamWScalars&);
template void adamw_step_bfloat16<BFloat16, AdamWRounding::kahan>(const AdamWSpan&,
                                                                  const AdamWScalars&);
template void adamw_step_bfloat16<BFloat16, AdamWRounding::split>(const AdamWSpan&,
                                                                  const AdamWScalars&);

}  // namespace torchweld::kernels::TORCHWELD_ISA
