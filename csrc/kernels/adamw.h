// The AdamW step on raw memory: what a kernel is given, and the table of kernels an instruction set
// provides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace torchweld::kernels {

// How the moments are stored.
//   like_param  in the parameter's dtype, rounded to nearest: torch's fused step, bit for bit.
//   bfloat16    stochastically rounded, so that a second moment can decay however near beta2 is
//               to 1: rounded to nearest, it cannot at 0.999.
//   int8        one byte each, and a float for every kAdamWBlock elements; see AdamWSpan.
enum class AdamWState { like_param, bfloat16, int8 };
inline constexpr std::size_t kAdamWStateCount = 3;

// How a 16-bit parameter is stored.
//   nearest     as torch does; updates below half a unit in the last place are lost.
//   stochastic  up or down at random, right on average.
//   kahan       nearest, and what rounding took away in `compensation` (bfloat16,
//               stochastically rounded), which the next step adds again.
//   split       the upper half of a float32 master, nearest; the lower half in `compensation`
//               (int16): master = (bits of param << 16) + compensation, exactly.
enum class AdamWRounding { nearest, stochastic, kahan, split };
inline constexpr std::size_t kAdamWRoundingCount = 4;

// Elements of a parameter that share one scale in int8 states; the last block may be shorter.
inline constexpr int64_t kAdamWBlock = 256;

// One contiguous run of elements of a parameter and of its states; param and grad of one type.
//
// int8 states are minifloats, `exp_avg` with a sign: a code stands for
//   int8 exp_avg:     value(code & 127) / value(127) * scale, negative if code & 128
//   int8 exp_avg_sq:  value(code) / value(255) * scale
//   value(code)    =  (8 + code % 8) << (code / 8), less 8
// so code 0 is zero, the first 8 steps are even, and after them there are 8 to each power of two.
// The scale is an upper bound of the block, kept without seeing the results:
//   exp_avg_scale'    = beta1 * exp_avg_scale + (1 - beta1) * max |grad|     (exp_avg_sq alike)
// so one pass is enough. In a block that has seen a gradient no code of exp_avg_sq is 0: beside a
// first moment that is not, it would make the next update explode. A non-finite gradient makes its
// element non-finite at once, as in torch, and its whole block at the next step.
struct AdamWSpan {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;     // null unless amsgrad
  void* compensation;       // kahan: bfloat16; split: int16; else null
  float* exp_avg_scale;     // int8 states: one for each block; else null
  float* exp_avg_sq_scale;  // likewise
  int64_t size;
  int64_t index;  // place of the first element in its whole parameter; counts the random bits
};

// Scalars of a step, computed in double by the caller as torch's fused CPU step does and rounded to
// the arithmetic type by the kernel.
struct AdamWScalars {
  double decay;  // 1 - lr * weight_decay
  double beta1;
  double beta2;
  double step_size;  // lr / (1 - beta1^step)
  double bias_root;  // sqrt(1 - beta2^step)
  double eps;
  double grad_scale;  // factor on the gradient: clipping and 1 / loss scale; negative to maximize
  uint64_t key = 0;   // adamw_key of this parameter and step; unused where nothing is random
};

// Random bits are a function of this key and of an element's index, and of nothing else: the same
// on every instruction set and rank, for any number of threads and any sharding. Over 2^32
// elements of one parameter they repeat.
constexpr uint64_t adamw_key(uint64_t seed, uint64_t step, uint64_t parameter) {
  // The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
  // generators, OOPSLA 2014).
  const auto mix = [](uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  };
  return mix(mix(mix(seed) ^ step) ^ parameter);
}

// A tensor may be cut into spans at multiples of this many elements without changing a bit; with
// int8 states, at multiples of kAdamWBlock.
inline constexpr int64_t kAdamWSpanUnit = 16;
static_assert(kAdamWBlock % kAdamWSpanUnit == 0);

// Bytes of a moment. like_param with a rounding other than nearest means bfloat16.
constexpr std::size_t state_size(DType param, AdamWState state, AdamWRounding rounding) {
  if (state == AdamWState::int8) return 1;
  const bool as_param = state == AdamWState::like_param && rounding == AdamWRounding::nearest;
  return as_param ? size_of(param) : 2;
}

// Elements [begin, begin + size) of a span. `begin` is a multiple of kAdamWSpanUnit, with int8
// states of kAdamWBlock.
inline AdamWSpan part(const AdamWSpan& s, DType param, AdamWState state, AdamWRounding rounding,
                      int64_t begin, int64_t size) {
  const auto at = [begin](void* data, std::size_t element_size) -> void* {
    return data == nullptr ? nullptr : static_cast<char*>(data) + begin * element_size;
  };
  const std::size_t p = size_of(param);
  const std::size_t m = state_size(param, state, rounding);
  return {
      .param = at(s.param, p),
      .grad = static_cast<const char*>(s.grad) + begin * p,
      .exp_avg = at(s.exp_avg, m),
      .exp_avg_sq = at(s.exp_avg_sq, m),
      .max_exp_avg_sq = at(s.max_exp_avg_sq, m),
      .compensation = at(s.compensation, 2),
      .exp_avg_scale = s.exp_avg_scale ? s.exp_avg_scale + begin / kAdamWBlock : nullptr,
      .exp_avg_sq_scale = s.exp_avg_sq_scale ? s.exp_avg_sq_scale + begin / kAdamWBlock : nullptr,
      .size = size,
      .index = s.index + begin};
}

// Updates the span in place. Float32 and 16-bit storage computes in float, float64 in double; each
// value is rounded once, when stored. Touches nothing outside the span; spans may run in parallel.
using AdamWKernel = void (*)(const AdamWSpan& span, const AdamWScalars& scalars);

// What to look at after a step, over elements still in cache. `param_before` and
// `compensation_before` are copies made before the step; compensation_before is null unless kahan
// or split: the weight looked at is then the sum of the two, in float.
struct AdamWObserver {
  const void* param_before;
  const void* compensation_before;
  void* ema;           // null, or an average in float (float64 parameters: double):
  double ema_weight;   // ema += ema_weight * (weight - ema)
  BFloat16* bfloat16;  // null, or a copy of the weight, rounded to nearest; not of float64
};

// Sums over elements; an observation adds to them.
struct AdamWStatistics {
  double update_squares;  // of weight - weight before, in double, in an order fixed by span.size
  int64_t lost;           // the weight stayed as it was, though its exact update is not zero
  int64_t nonfinite;      // gradients that are infinite or NaN
};

// `span` is the one just stepped, with the scalars of the step.
using AdamWObserve = void (*)(const AdamWSpan& span, const AdamWScalars& scalars,
                              const AdamWObserver& observer, AdamWStatistics* statistics);

// A norm is a sum over pieces of so many elements; that of a piece one over its parts, in their
// order. Fixed, so that its bits are.
inline constexpr int64_t kAdamWSumPiece = 1 << 14;
inline constexpr int64_t kAdamWSumPart = 1 << 11;

// Sums of pieces are added up by this many lanes, one after the other in each, then
// lane l + n to lane l for n = kAdamWSumLanes / 2, ..., 1: an order for the threads of a GPU too.
inline constexpr int64_t kAdamWSumLanes = 512;

inline double adamw_total(const double* sums, int64_t count) {
  double lanes[kAdamWSumLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kAdamWSumLanes] += sums[i];
  for (int64_t n = kAdamWSumLanes / 2; n > 0; n /= 2) {
    for (int64_t lane = 0; lane < n; ++lane) lanes[lane] += lanes[lane + n];
  }
  return lanes[0];
}

// Sum of squares of `size` elements, in double, in an order fixed by `size` alone. Not finite if
// an element is not (of float64 elements, also if a square overflows).
using SumOfSquaresKernel = double (*)(const void* data, int64_t size);

// int8 states from and to float, rounded to nearest, the scale of a block its largest magnitude.
// ceil(size / kAdamWBlock) scales. The codes of exp_avg_sq are unsigned and at least 1 where the
// value is not 0.
using AdamWEncode = void (*)(const float* values, int64_t size, uint8_t* codes, float* scales);
using AdamWDecode = void (*)(const uint8_t* codes, const float* scales, int64_t size,
                             float* values);

// Whether a combination exists, with amsgrad or without; int8 only without.
constexpr bool adamw_exists(DType param, AdamWState state, AdamWRounding rounding) {
  if (param == DType::bfloat16) return true;
  return rounding == AdamWRounding::nearest &&
         (param != DType::float64 || state == AdamWState::like_param);
}

// [param dtype][state][rounding]; null where a combination does not exist.
template <class Kernel>
struct AdamWTable {
  Kernel kernels[kDTypeCount][kAdamWStateCount][kAdamWRoundingCount];

  Kernel operator()(DType param, AdamWState state = AdamWState::like_param,
                    AdamWRounding rounding = AdamWRounding::nearest) const {
    return kernels[static_cast<int>(param)][static_cast<int>(state)][static_cast<int>(rounding)];
  }
};

struct AdamWKernels {
  AdamWTable<AdamWKernel> step;
  AdamWTable<AdamWObserve> observe;
  SumOfSquaresKernel sum_of_squares[kDTypeCount];
  AdamWEncode encode_exp_avg;
  AdamWEncode encode_exp_avg_sq;
  AdamWDecode decode_exp_avg;
  AdamWDecode decode_exp_avg_sq;
};

}  // namespace torchweld::kernels
