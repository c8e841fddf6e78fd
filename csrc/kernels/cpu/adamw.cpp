// The AdamW step. Formula and rounding follow torch's fused CPU step bit for bit, so that a run may
// change from one to the other at any step (aten/src/ATen/native/cpu/FusedAdamKernel.cpp). Where
// torch leaves contraction to its compiler, fma is written out in kernels/adamw_math.h, so that
// every instruction set gives the same bits.
#include "kernels/adamw_math.h"
#include "kernels/cpu/adamw_low_bit.h"
#include "kernels/cpu/adamw_sums.h"
#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

template <class T, bool kAmsgrad>
struct Span {
  using Vec = typename Math<T>::Vec;
  static constexpr int kLanes = Math<T>::kLanes;
  T* p;
  const T* g;
  T* m;
  T* v;
  T* v_max;

  void update_at(int64_t i, const Step<T>& step, bool tail) const {
    Vec pv = load(p + i), mv = load(m + i), vv = load(v + i);
    if constexpr (kAmsgrad) {
      Vec xv = load(v_max + i);
      step.update(pv, load(g + i), mv, vv, &xv, tail);
      store(v_max + i, xv);
    } else {
      step.update(pv, load(g + i), mv, vv, nullptr, tail);
    }
    store(p + i, pv);
    store(m + i, mv);
    store(v + i, vv);
  }

  // Elements [begin, end), fewer than a register holds, through zero-padded copies.
  void update_partial(int64_t begin, int64_t end, const Step<T>& step, bool tail) const {
    if (begin == end) return;
    const size_t bytes = (size_t)(end - begin) * sizeof(T);
    T copies[5][kLanes];
    memset(copies, 0, sizeof copies);
    memcpy(copies[0], p + begin, bytes);
    memcpy(copies[1], g + begin, bytes);
    memcpy(copies[2], m + begin, bytes);
    memcpy(copies[3], v + begin, bytes);
    if constexpr (kAmsgrad) memcpy(copies[4], v_max + begin, bytes);
    Span{copies[0], copies[1], copies[2], copies[3], copies[4]}.update_at(0, step, tail);
    memcpy(p + begin, copies[0], bytes);
    memcpy(m + begin, copies[2], bytes);
    memcpy(v + begin, copies[3], bytes);
    if constexpr (kAmsgrad) memcpy(v_max + begin, copies[4], bytes);
  }

  void update(int64_t size, const Step<T>& step) const {
    const int64_t tail = size - size % kTorchLanes<T>;
    int64_t i = 0;
    for (; i + kLanes <= tail; i += kLanes) update_at(i, step, false);
    update_partial(i, tail, step, false);
    for (i = tail; i + kLanes <= size; i += kLanes) update_at(i, step, true);
    update_partial(i, size, step, true);
  }
};

template <class T, bool kAmsgrad>
void run(const AdamWSpan& s, const AdamWScalars& scalars) {
  Span<T, kAmsgrad>{(T*)s.param, (const T*)s.grad, (T*)s.exp_avg, (T*)s.exp_avg_sq,
                    (T*)s.max_exp_avg_sq}
      .update(s.size, Step<T>(scalars));
}

template <class T>
void adamw_step(const AdamWSpan& span, const AdamWScalars& scalars) {
  span.max_exp_avg_sq != nullptr ? run<T, true>(span, scalars) : run<T, false>(span, scalars);
}

template <class T>
double sum_of_squares(const void* data, int64_t size) {
  using Sums = SquareSums<T>;
  const T* x = static_cast<const T*>(data);
  Sums sums;
  const auto add_block = [&sums](const T* block) {
    for (int r = 0; r < Sums::kRegisters; ++r) sums.add(r, load(block + r * Math<T>::kLanes));
  };
  int64_t i = 0;
  for (; i + Sums::kSize <= size; i += Sums::kSize) add_block(x + i);
  if (i < size) {
    T rest[Sums::kSize];
    memset(rest, 0, sizeof rest);
    memcpy(rest, x + i, (size_t)(size - i) * sizeof(T));
    add_block(rest);
  }
  return sums.total();
}

constexpr AdamWRounding kNearest = AdamWRounding::nearest;
constexpr AdamWRounding kStochastic = AdamWRounding::stochastic;
constexpr AdamWRounding kKahan = AdamWRounding::kahan;
constexpr AdamWRounding kSplit = AdamWRounding::split;

// Of bfloat16 parameters: nearest and stochastic, kahan, split.
constexpr AdamWObserve observe_16[] = {adamw_observe<BFloat16, BFloat16, kNearest>,
                                       adamw_observe<BFloat16, BFloat16, kKahan>,
                                       adamw_observe<BFloat16, BFloat16, kSplit>};
constexpr AdamWObserve observe_8[] = {adamw_observe<BFloat16, uint8_t, kNearest>,
                                      adamw_observe<BFloat16, uint8_t, kKahan>,
                                      adamw_observe<BFloat16, uint8_t, kSplit>};

}  // namespace

extern const AdamWKernels adamw;
const AdamWKernels adamw{
    // [dtype][state][rounding]
    .step = {{{{adamw_step<float>},
               {adamw_step_bfloat16<float, kNearest>},
               {adamw_step_int8<float, kNearest>}},
              {{adamw_step<double>}},
              {{adamw_step<BFloat16>, adamw_step_bfloat16<BFloat16, kStochastic>,
                adamw_step_bfloat16<BFloat16, kKahan>, adamw_step_bfloat16<BFloat16, kSplit>},
               {adamw_step_bfloat16<BFloat16, kNearest>, adamw_step_bfloat16<BFloat16, kStochastic>,
                adamw_step_bfloat16<BFloat16, kKahan>, adamw_step_bfloat16<BFloat16, kSplit>},
               {adamw_step_int8<BFloat16, kNearest>, adamw_step_int8<BFloat16, kStochastic>,
                adamw_step_int8<BFloat16, kKahan>, adamw_step_int8<BFloat16, kSplit>}},
              {{adamw_step<Float16>},
               {adamw_step_bfloat16<Float16, kNearest>},
               {adamw_step_int8<Float16, kNearest>}}}},
    .observe = {{{{adamw_observe<float, float, kNearest>},
                  {adamw_observe<float, BFloat16, kNearest>},
                  {adamw_observe<float, uint8_t, kNearest>}},
                 {{adamw_observe<double, double, kNearest>}},
                 {{observe_16[0], observe_16[0], observe_16[1], observe_16[2]},
                  {observe_16[0], observe_16[0], observe_16[1], observe_16[2]},
                  {observe_8[0], observe_8[0], observe_8[1], observe_8[2]}},
                 {{adamw_observe<Float16, Float16, kNearest>},
                  {adamw_observe<Float16, BFloat16, kNearest>},
                  {adamw_observe<Float16, uint8_t, kNearest>}}}},
    .sum_of_squares = {sum_of_squares<float>, sum_of_squares<double>, sum_of_squares<BFloat16>,
                       sum_of_squares<Float16>},
    .encode_exp_avg = encode_exp_avg,
    .encode_exp_avg_sq = encode_exp_avg_sq,
    .decode_exp_avg = decode_exp_avg,
    .decode_exp_avg_sq = decode_exp_avg_sq,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
