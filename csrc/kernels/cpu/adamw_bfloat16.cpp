// The AdamW step with bfloat16 moments, stochastically rounded.
#include "kernels/cpu/adamw_low_bit.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// Two registers of elements are updated together. Where parameters are bfloat16 too, one holds the
// even elements of a full register of words and one the odd ones, which costs a shift and a mask
// where 16-bit loads and stores in order would cost shuffles.
constexpr int64_t kPair = 2 * kLanesF;

template <class T>
constexpr bool kInterleaved = __is_same(T, BFloat16);

using Pair = VecU32[2];  // of bfloat16 in the upper halves

template <bool kEvenOdd>
void load_pair(const void* p, Pair& x) {
  if constexpr (kEvenOdd) {
    VecU32 words;
    memcpy(&words, p, sizeof words);
    x[0] = words << 16;
    x[1] = words & 0xffff0000u;
  } else {
    for (int j = 0; j < 2; ++j) {
      VecU16 bits;
      memcpy(&bits, (const char*)p + j * sizeof bits, sizeof bits);
      x[j] = widen(bits) << 16;
    }
  }
}

template <bool kEvenOdd>
void store_pair(void* p, const Pair& x) {
  if constexpr (kEvenOdd) {
    const VecU32 words = select_bits(broadcast<VecU32>(0xffff0000u), x[1], x[0] >> 16);
    memcpy(p, &words, sizeof words);
  } else {
    for (int j = 0; j < 2; ++j) {
      const VecU16 bits = narrow(x[j] >> 16);
      memcpy((char*)p + j * sizeof bits, &bits, sizeof bits);  // p has no alignment
    }
  }
}

template <class T, AdamWRounding kRounding, bool kAmsgrad>
struct Span {
  static constexpr bool kEvenOdd = kInterleaved<T>;
  T* p;
  const T* g;
  BFloat16* m;
  BFloat16* v;
  BFloat16* v_max;
  uint16_t* c;

  // kPair elements from `i` on.
  void update_at(int64_t i, const LowBitStep& step, VecF beta1, VecF beta2, Random& random) const {
    Pair gs, ms, vs, xs, ps, cs;
    load_pair<kEvenOdd>(m + i, ms);
    load_pair<kEvenOdd>(v + i, vs);
    if constexpr (kAmsgrad) load_pair<kEvenOdd>(v_max + i, xs);
    if constexpr (kEvenOdd) {
      load_pair<true>(g + i, gs);
      load_pair<true>(p + i, ps);
      if constexpr (kCompensated<kRounding>) load_pair<true>(c + i, cs);
    }
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanesF;
      const Random::Bits bits = kEvenOdd ? random.next(j == 0 ? 1 : (int)kPair - 1) : random.next();
      VecF mv = (VecF)ms[j] * beta1, vv = (VecF)vs[j] * beta2;
      if constexpr (kEvenOdd) {
        step.moments((VecF)gs[j], mv, vv);
      } else {
        step.moments(load(g + at), mv, vv);
      }
      VecF second = vv;
      if constexpr (kAmsgrad) {
        // Nearest: a maximum does not build up, so neither does its rounding error.
        second = larger((VecF)xs[j], vv);
        xs[j] = round_nearest(second);
      }
      if constexpr (kEvenOdd) {
        Weight16<kRounding> w{ps[j], VecU32{}};
        if constexpr (kCompensated<kRounding>) w.compensation = cs[j];
        w = Weight16<kRounding>::of(step.weight(w.value(), mv, second), bits.other16());
        ps[j] = w.param;
        cs[j] = w.compensation;
      } else {
        store(p + at, step.weight(load(p + at), mv, second));
      }
      ms[j] = round_stochastic(mv, bits.low16());
      vs[j] = round_stochastic(vv, bits.high16());
    }
    store_pair<kEvenOdd>(m + i, ms);
    store_pair<kEvenOdd>(v + i, vs);
    if constexpr (kAmsgrad) store_pair<kEvenOdd>(v_max + i, xs);
    if constexpr (kEvenOdd) store_pair<true>(p + i, ps);
    if constexpr (kCompensated<kRounding>) store_pair<true>(c + i, cs);
  }

  // The last elements, fewer than kPair, through zero-padded copies.
  void update_last(int64_t begin, int64_t count, const LowBitStep& step, VecF beta1, VecF beta2,
                   Random& random) const {
    T p_copy[kPair] = {}, g_copy[kPair] = {};
    BFloat16 m_copy[kPair] = {}, v_copy[kPair] = {}, x_copy[kPair] = {};
    uint16_t c_copy[kPair] = {};
    const size_t bytes = (size_t)count * sizeof(T), bytes16 = (size_t)count * 2;
    memcpy(p_copy, p + begin, bytes);
    memcpy(g_copy, g + begin, bytes);
    memcpy(m_copy, m + begin, bytes16);
    memcpy(v_copy, v + begin, bytes16);
    if constexpr (kAmsgrad) memcpy(x_copy, v_max + begin, bytes16);
    if constexpr (kCompensated<kRounding>) memcpy(c_copy, c + begin, bytes16);
    Span{p_copy, g_copy, m_copy, v_copy, x_copy, c_copy}.update_at(0, step, beta1, beta2, random);
    memcpy(p + begin, p_copy, bytes);
    memcpy(m + begin, m_copy, bytes16);
    memcpy(v + begin, v_copy, bytes16);
    if constexpr (kAmsgrad) memcpy(v_max + begin, x_copy, bytes16);
    if constexpr (kCompensated<kRounding>) memcpy(c + begin, c_copy, bytes16);
  }
};

template <class T, AdamWRounding kRounding, bool kAmsgrad>
void run(const AdamWSpan& s, const AdamWScalars& scalars) {
  const Span<T, kRounding, kAmsgrad> span{(T*)s.param,
                                          (const T*)s.grad,
                                          (BFloat16*)s.exp_avg,
                                          (BFloat16*)s.exp_avg_sq,
                                          (BFloat16*)s.max_exp_avg_sq,
                                          (uint16_t*)s.compensation};
  const LowBitStep step(scalars);
  const VecF beta1 = broadcast<VecF>((float)scalars.beta1);
  const VecF beta2 = broadcast<VecF>((float)scalars.beta2);
  Random random(scalars.key, s.index, kInterleaved<T> ? 2 : 1);
  int64_t i = 0;
  for (; i + kPair <= s.size; i += kPair) span.update_at(i, step, beta1, beta2, random);
  if (i < s.size) span.update_last(i, s.size - i, step, beta1, beta2, random);
}

}  // namespace

template <class T, AdamWRounding kRounding>
void adamw_step_bfloat16(const AdamWSpan& span, const AdamWScalars& scalars) {
  span.max_exp_avg_sq != nullptr ? run<T, kRounding, true>(span, scalars)
                                 : run<T, kRounding, false>(span, scalars);
}

#define TORCHWELD_STEP(T, rounding)                                               \
  template void adamw_step_bfloat16<T, AdamWRounding::rounding>(const AdamWSpan&, \
                                                                const AdamWScalars&);

TORCHWELD_STEP(float, nearest)
TORCHWELD_STEP(Float16, nearest)
TORCHWELD_STEP(BFloat16, nearest)
TORCHWELD_STEP(BFloat16, stochastic)
TORCHWELD_STEP(BFloat16, kahan)
TORCHWELD_STEP(BFloat16, split)

#undef TORCHWELD_STEP

}  // namespace torchweld::kernels::TORCHWELD_ISA
