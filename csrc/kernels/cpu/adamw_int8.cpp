// The AdamW step with int8 moments, in one pass, and their conversion from and to float.
#include "kernels/cpu/adamw_codec.h"
#include "kernels/cpu/adamw_low_bit.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

constexpr int64_t kBlock = kAdamWBlock;
static_assert(kBlock % kLanesF == 0);

// The largest magnitude seen, as float bits: in their order NaN is above infinity.
class Peak {
 public:
  void add(VecF x) {
    const VecI32 bits = (VecI32)x & 0x7fffffff;
    bits_ = bits > bits_ ? bits : bits_;
  }

  float value() const {
#if defined(__AVX512F__)
    const int32_t bits = _mm512_reduce_max_epi32((__m512i)bits_);
#else
    int32_t bits = bits_[0];
    for (int lane = 1; lane < kLanesF; ++lane) bits = bits_[lane] > bits ? bits_[lane] : bits;
#endif
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
  }

 private:
  VecI32 bits_ = {};
};

template <class T>
float peak_of(const T* x) {
  Peak peak;
  for (int64_t i = 0; i < kBlock; i += kLanesF) peak.add(load(x + i));
  return peak.value();
}

template <class T, AdamWRounding kRounding>
struct Block {
  Weights<T, kRounding> weights;
  const T* g;
  uint8_t* m;
  uint8_t* v;
  float* m_scale;
  float* v_scale;
};

template <class T, AdamWRounding kRounding>
class Stepper {
 public:
  explicit Stepper(const AdamWScalars& s) : step_(s), scales_(s) {}

  // `peak` of this block's gradients. Returns that of `next`, read along so that the next block
  // need not wait for it.
  float update(const Block<T, kRounding>& b, float peak, const T* next, Random& random) const {
    const BlockScales scales = scales_.update(*b.m_scale, *b.v_scale, peak);
    *b.m_scale = scales.m;
    *b.v_scale = scales.v;
    const VecF m_decode = broadcast<VecF>(scales.m_decode);
    const VecF v_decode = broadcast<VecF>(scales.v_decode);
    const VecF m_encode = broadcast<VecF>(scales.m_encode);
    const VecF v_encode = broadcast<VecF>(scales.v_encode);
    const VecF v_least = broadcast<VecF>(scales.v_least);
    Peak next_peak;
    for (int64_t i = 0; i < kBlock; i += kLanesF) {
      const Random::Bits bits = random.next();
      VecF m = decode_codes(ExpAvgCodec{}, b.m + i, m_decode);
      VecF v = decode_codes(ExpAvgSqCodec{}, b.v + i, v_decode);
      step_.moments(load(b.g + i), m, v);
      b.weights.store_at(i, step_.weight(b.weights.load_at(i), m, v), bits);
      store_codes(b.m + i, ExpAvgCodec::encode(m, m_encode, bits.low20()));
      store_codes(b.v + i, ExpAvgSqCodec::encode(v, v_encode, bits.high20(), v_least));
      next_peak.add(load(next + i));
    }
    return next_peak.value();
  }

  // The last block, shorter than others, through zero-padded copies.
  void update_last(const Block<T, kRounding>& b, int64_t count, Random& random) const {
    T p[kBlock] = {}, g[kBlock] = {};
    uint16_t c[kBlock] = {};
    uint8_t m[kBlock] = {}, v[kBlock] = {};
    const size_t bytes = (size_t)count * sizeof(T), codes = (size_t)count;
    memcpy(p, b.weights.param, bytes);
    memcpy(g, b.g, bytes);
    memcpy(m, b.m, codes);
    memcpy(v, b.v, codes);
    if (b.weights.compensation) memcpy(c, b.weights.compensation, 2 * codes);
    update({{p, c}, g, m, v, b.m_scale, b.v_scale}, peak_of(g), g, random);
    memcpy(b.weights.param, p, bytes);
    memcpy(b.m, m, codes);
    memcpy(b.v, v, codes);
    if (b.weights.compensation) memcpy(b.weights.compensation, c, 2 * codes);
  }

 private:
  LowBitStep step_;
  ScaleStep scales_;
};

// Calls `convert(values, codes, scale)` for every block, the last one through padded copies.
template <class Convert>
void encode(const float* values, int64_t size, uint8_t* codes, float* scales, Convert convert) {
  for (; size >= kBlock; size -= kBlock) {
    convert(values, codes, scales++);
    values += kBlock;
    codes += kBlock;
  }
  if (size > 0) {
    float padded[kBlock] = {};
    uint8_t result[kBlock];
    memcpy(padded, values, (size_t)size * sizeof(float));
    convert(padded, result, scales);
    memcpy(codes, result, (size_t)size);
  }
}

template <class Codec>
void decode(const uint8_t* codes, const float* scales, int64_t size, float* values) {
  for (int64_t i = 0; i < size; i += kLanesF) {
    const VecF unit = broadcast<VecF>(scales[i / kBlock] / Codec::kRange);
    const int64_t count = size - i < kLanesF ? size - i : kLanesF;
    uint8_t copy[kLanesF] = {};
    memcpy(copy, codes + i, (size_t)count);
    store_partial(values + i, decode_codes(Codec{}, copy, unit), count);
  }
}

}  // namespace

template <class T, AdamWRounding kRounding>
void adamw_step_int8(const AdamWSpan& s, const AdamWScalars& scalars) {
  const Stepper<T, kRounding> stepper(scalars);
  Random random(scalars.key, s.index);
  const auto block = [&s](int64_t begin) {
    uint16_t* compensation = (uint16_t*)s.compensation;
    return Block<T, kRounding>{
        {(T*)s.param + begin, compensation == nullptr ? nullptr : compensation + begin},
        (const T*)s.grad + begin,
        (uint8_t*)s.exp_avg + begin,
        (uint8_t*)s.exp_avg_sq + begin,
        s.exp_avg_scale + begin / kBlock,
        s.exp_avg_sq_scale + begin / kBlock};
  };
  const int64_t whole = s.size - s.size % kBlock;
  float peak = whole > 0 ? peak_of((const T*)s.grad) : 0;
  for (int64_t begin = 0; begin < whole; begin += kBlock) {
    const T* g = (const T*)s.grad + begin;
    peak = stepper.update(block(begin), peak, begin + kBlock < whole ? g + kBlock : g, random);
  }
  if (whole < s.size) stepper.update_last(block(whole), s.size - whole, random);
}

template void adamw_step_int8<float, AdamWRounding::nearest>(const AdamWSpan&, const AdamWScalars&);
template void adamw_step_int8<Float16, AdamWRounding::nearest>(const AdamWSpan&,
                                                               const AdamWScalars&);
template void adamw_step_int8<BFloat16, AdamWRounding::nearest>(const AdamWSpan&,
                                                                const AdamWScalars&);
template void adamw_step_int8<BFloat16, AdamWRounding::stochastic>(const AdamWSpan&,
                                                                   const AdamWScalars&);
template void adamw_step_int8<BFloat16, AdamWRounding::kahan>(const AdamWSpan&,
                                                              const AdamWScalars&);
template void adamw_step_int8<BFloat16, AdamWRounding::split>(const AdamWSpan&,
                                                              const AdamWScalars&);

void encode_exp_avg(const float* values, int64_t size, uint8_t* codes, float* scales) {
  encode(values, size, codes, scales, [](const float* x, uint8_t* code, float* scale) {
    using Codec = ExpAvgCodec;
    *scale = peak_of(x);
    const VecF inverse = broadcast<VecF>(Codec::kRange / at_least(*scale, Codec::kLeastScale));
    const VecU32 nearest = broadcast<VecU32>(kRoundNearest);
    for (int64_t i = 0; i < kBlock; i += kLanesF) {
      store_codes(code + i, Codec::encode(load(x + i), inverse, nearest));
    }
  });
}

void encode_exp_avg_sq(const float* values, int64_t size, uint8_t* codes, float* scales) {
  encode(values, size, codes, scales, [](const float* x, uint8_t* code, float* scale) {
    using Codec = ExpAvgSqCodec;
    *scale = peak_of(x);
    const VecF inverse = broadcast<VecF>(Codec::kRange / at_least(*scale, Codec::kLeastScale));
    const VecU32 nearest = broadcast<VecU32>(kRoundNearest);
    for (int64_t i = 0; i < kBlock; i += kLanesF) {
      const VecF v = load(x + i);
      const VecF least = v != 0 ? broadcast<VecF>(kCodeOne) : broadcast<VecF>(kCodeZero);
      store_codes(code + i, Codec::encode(v, inverse, nearest, least));
    }
  });
}

void decode_exp_avg(const uint8_t* codes, const float* scales, int64_t size, float* values) {
  decode<ExpAvgCodec>(codes, scales, size, values);
}

void decode_exp_avg_sq(const uint8_t* codes, const float* scales, int64_t size, float* values) {
  decode<ExpAvgSqCodec>(codes, scales, size, values);
}

}  // namespace torchweld::kernels::TORCHWELD_ISA
