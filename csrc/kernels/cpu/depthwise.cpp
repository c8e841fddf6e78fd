#include "kernels/depthwise.h"

#include "kernels/cpu/loop.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// Output pixels of a tile, each one register of sums; beside them the taps of a row stay in
// registers. Enough to hide the latency of the multiply-adds, and a divisor of the usual widths.
#if defined(__AVX512F__)
inline constexpr int kWidestTile = 14;
#else
inline constexpr int kWidestTile = 7;
#endif

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Fetches a stretch of memory in as many equal portions as there will be tiles.
class Ahead {
 public:
  Ahead(const DepthwiseAhead& ahead, int64_t tiles)
      : next_((const char*)ahead.data),
        left_(ahead.size * (int64_t)sizeof(float)),
        portion_((left_ / (tiles > 0 ? tiles : 1) / 64 + 1) * 64) {}

  template <bool kWrite>
  void fetch() {
    const int64_t size = portion_ < left_ ? portion_ : left_;
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next_ + i, kWrite, 2);
    next_ += size;
    left_ -= size;
  }

 private:
  const char* next_;
  int64_t left_;
  int64_t portion_;
};

template <class P>
__attribute__((always_inline)) inline VecF finish(const Epilogue& e, VecF value, int64_t offset,
                                                  int64_t c, P part) {
  if (e.bias != nullptr) value += load(e.bias + c, part);
  if (e.residual != nullptr) value += load(e.residual + offset, part);
  const VecF low = broadcast<VecF>(e.low), high = broadcast<VecF>(e.high);
  value = value < low ? low : value;
  return value > high ? high : value;
}

// kPixels outputs from pixel q on, of the channels from c on. kTaps and kStep are zero where they
// are not known before the call. Unless kInside, taps outside the row are left out.
template <int kPixels, int kTaps, int kStep, bool kInside, class P>
__attribute__((noinline)) void tile(const DepthwiseForward& d, int64_t c, int64_t q, P part) {
  const int64_t channels = d.taps.channels;
  const int64_t lane = (c / kDepthwiseGroup) * d.weight_group + c % kDepthwiseGroup;
  const int64_t from = d.taps.first + q * (kStep > 0 ? kStep : d.taps.step);
  const auto inside = [&](int64_t pixel) {
    return kInside || (uint64_t)pixel < (uint64_t)d.taps.width;
  };
  VecF sums[kPixels];
#pragma GCC unroll 16
  for (int t = 0; t < kPixels; ++t) sums[t] = VecF{};

  for (int64_t r = 0; r < d.taps.rows; ++r) {
    const float* w = d.weight[r] + lane;
    if constexpr (kTaps > 0) {
      VecF taps[kTaps];
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) taps[s] = load(w + s * kDepthwiseGroup);
      // Every input pixel is loaded once and meets all the outputs it has a part in.
      const float* x = d.taps.input[r] + from * channels + c;
#pragma GCC unroll 48
      for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j, x += channels) {
        if (!inside(from + j)) continue;
        const VecF value = load(x, part);
#pragma GCC unroll 8
        for (int s = 0; s < kTaps; ++s) {
          const int t = (j - s) / (kStep > 0 ? kStep : 1);
          if (j >= s && t < kPixels && t * kStep == j - s) sums[t] = fma(value, taps[s], sums[t]);
        }
      }
    } else {
      for (int64_t s = 0; s < d.taps.taps; ++s) {
        const VecF tap = load(w + s * kDepthwiseGroup);
#pragma GCC unroll 16
        for (int t = 0; t < kPixels; ++t) {
          const int64_t pixel = from + t * d.taps.step + s * d.taps.tap_step;
          if (!inside(pixel)) continue;
          sums[t] = fma(load(d.taps.input[r] + pixel * channels + c, part), tap, sums[t]);
        }
      }
    }
  }

#pragma GCC unroll 16
  for (int t = 0; t < kPixels; ++t) {
    const int64_t offset = (q + t) * d.output_step + c;
    store(d.output + offset, finish(d.epilogue, sums[t], offset, c, part), part);
  }
}

// Tiles of kPixels from pixel q on.
template <int kPixels, int kTaps, int kStep, class P>
int64_t tiles(const DepthwiseForward& d, int64_t c, int64_t q, P part, Ahead& input,
              Ahead& output) {
  for (; q + kPixels <= d.output_width; q += kPixels) {
    const int64_t from = d.taps.first + q * kStep;
    const bool inside = kTaps > 0 && kPixels >= 7 && from >= 0 &&
                        from + (kPixels - 1) * kStep + kTaps <= d.taps.width;
    input.fetch<false>();
    output.fetch<true>();
    if (inside) {
      tile<kPixels, kTaps, kStep, (kTaps > 0 && kPixels >= 7)>(d, c, q, part);
    } else {
      tile<kPixels, kTaps, kStep, false>(d, c, q, part);
    }
  }
  return q;
}

template <int kTaps, int kStep, class P>
void line(const DepthwiseForward& d, int64_t c, P part, Ahead& input, Ahead& output) {
  int64_t q = 0;
  if constexpr (kWidestTile > 7) q = tiles<kWidestTile, kTaps, kStep>(d, c, q, part, input, output);
  q = tiles<7, kTaps, kStep>(d, c, q, part, input, output);
  q = tiles<3, kTaps, kStep>(d, c, q, part, input, output);
  tiles<1, kTaps, kStep>(d, c, q, part, input, output);
}

template <int kTaps, int kStep>
void forward_row(const DepthwiseForward& d) {
  const int64_t channels = d.taps.channels;
  const int64_t count =
      ((channels + kLanesF - 1) / kLanesF) * ((d.output_width + kWidestTile - 1) / kWidestTile);
  Ahead input(d.input_ahead, count), output(d.output_ahead, count);
  int64_t c = 0;
  for (; c + kLanesF <= channels; c += kLanesF) {
    line<kTaps, kStep>(d, c, Whole{}, input, output);
  }
  if (c < channels) line<kTaps, kStep>(d, c, Part{channels - c}, input, output);
}

void forward(const DepthwiseForward& d) {
  const DepthwiseTaps& t = d.taps;
  const auto is = [&](int64_t taps, int64_t step) {
    return t.taps == taps && t.step == step && (t.tap_step == 1 || taps == 1);
  };
  if (is(3, 1)) return forward_row<3, 1>(d);
  if (is(3, 2)) return forward_row<3, 2>(d);
  if (is(5, 1)) return forward_row<5, 1>(d);
  if (is(5, 2)) return forward_row<5, 2>(d);
  // Those of a gradient with stride 2.
  if (is(1, 1)) return forward_row<1, 1>(d);
  if (is(2, 1)) return forward_row<2, 1>(d);
  forward_row<0, 0>(d);
}

// The sums of kRows x kTaps weights stay in registers along a row of output pixels.
template <int kRows, int kTaps, int kStep, class P>
__attribute__((noinline)) void gradient_line(const DepthwiseWeightGradient& d, int64_t row,
                                             int64_t c, P part, Ahead& ahead) {
  const int64_t channels = d.taps.channels, first = d.taps.first, width = d.taps.width;
  VecF sums[kRows][kTaps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) sums[r][s] = VecF{};
  }

  // Two pixels at a time share the input pixels between them.
  const auto pixels = [&](int64_t q, auto count, auto inside) __attribute__((always_inline)) {
    constexpr int kPixels = decltype(count)::value;
    VecF g[kPixels];
#pragma GCC unroll 4
    for (int t = 0; t < kPixels; ++t) g[t] = load(d.grad + (q + t) * channels + c, part);
    const int64_t from = first + q * kStep;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float* x = d.taps.input[row + r] + from * channels + c;
#pragma GCC unroll 16
      for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j, x += channels) {
        if (!inside.value && (uint64_t)(from + j) >= (uint64_t)width) continue;
        const VecF value = load(x, part);
#pragma GCC unroll 4
        for (int t = 0; t < kPixels; ++t) {
          const int s = j - t * kStep;
          if (s >= 0 && s < kTaps) sums[r][s] = fma(value, g[t], sums[r][s]);
        }
      }
    }
  };

  const int64_t begin = first >= 0 ? 0 : (-first + kStep - 1) / kStep;
  const int64_t end = width - kTaps >= first ? (width - kTaps - first) / kStep + 1 : 0;
  const int64_t last = end < d.grad_width ? end : d.grad_width;
  int64_t q = 0;
  for (; q < begin && q < d.grad_width; ++q) pixels(q, Constant<1>{}, Constant<false>{});
  for (; q + 2 <= last; q += 2) {
    ahead.fetch<false>();
    pixels(q, Constant<2>{}, Constant<true>{});
  }
  for (; q < d.grad_width; ++q) pixels(q, Constant<1>{}, Constant<false>{});

  float* to = d.sums + (c / kDepthwiseGroup) * d.sums_group + row * kTaps * kDepthwiseGroup +
              c % kDepthwiseGroup;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s, to += kDepthwiseGroup) store(to, load(to) + sums[r][s]);
  }
}

template <int kRows, int kTaps, int kStep, class P>
void gradient_rows(const DepthwiseWeightGradient& d, int64_t c, P part, Ahead& ahead) {
  int64_t row = 0;
  for (; row + kRows <= d.taps.rows; row += kRows) {
    gradient_line<kRows, kTaps, kStep>(d, row, c, part, ahead);
  }
  for (; row < d.taps.rows; ++row) gradient_line<1, kTaps, kStep>(d, row, c, part, ahead);
}

// Any taps: one sum at a time.
template <class P>
void gradient_any(const DepthwiseWeightGradient& d, int64_t c, P part) {
  const int64_t channels = d.taps.channels;
  float* to = d.sums + (c / kDepthwiseGroup) * d.sums_group + c % kDepthwiseGroup;
  for (int64_t r = 0; r < d.taps.rows; ++r) {
    for (int64_t s = 0; s < d.taps.taps; ++s, to += kDepthwiseGroup) {
      VecF sum{};
      for (int64_t q = 0; q < d.grad_width; ++q) {
        const int64_t pixel = d.taps.first + q * d.taps.step + s * d.taps.tap_step;
        if ((uint64_t)pixel >= (uint64_t)d.taps.width) continue;
        sum = fma(load(d.taps.input[r] + pixel * channels + c, part),
                  load(d.grad + q * channels + c, part), sum);
      }
      store(to, load(to) + sum);
    }
  }
}

template <int kRows, int kTaps, int kStep>
void gradient_row(const DepthwiseWeightGradient& d) {
  const int64_t channels = d.taps.channels;
  Ahead ahead(d.input_ahead, ((channels + kLanesF - 1) / kLanesF) * (d.grad_width / 2));
  for (int64_t c = 0; c < channels; c += kLanesF) {
    if constexpr (kTaps == 0) {
      if (c + kLanesF <= channels) {
        gradient_any(d, c, Whole{});
      } else {
        gradient_any(d, c, Part{channels - c});
      }
    } else if (c + kLanesF <= channels) {
      gradient_rows<kRows, kTaps, kStep>(d, c, Whole{}, ahead);
    } else {
      gradient_rows<kRows, kTaps, kStep>(d, c, Part{channels - c}, ahead);
    }
  }
}

void weight_gradient(const DepthwiseWeightGradient& d) {
#if defined(__AVX512F__)
  constexpr int kRowsOfFive = 5;
#else
  constexpr int kRowsOfFive = 2;  // with 16 registers
#endif
  const int64_t taps = d.taps.taps, step = d.taps.step;
  const bool dense = d.taps.tap_step == 1;
  if (dense && taps == 3 && step == 1) return gradient_row<3, 3, 1>(d);
  if (dense && taps == 3 && step == 2) return gradient_row<3, 3, 2>(d);
  if (dense && taps == 5 && step == 1) return gradient_row<kRowsOfFive, 5, 1>(d);
  if (dense && taps == 5 && step == 2) return gradient_row<kRowsOfFive, 5, 2>(d);
  gradient_row<0, 0, 0>(d);
}

void flush(float* sums, double* totals, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanesF) {
    VecD halves[2];
    widen(load(sums + i), halves);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      double* to = totals + i + h * kLanesD;
      store(to, load(to) + halves[h]);
    }
    store(sums + i, VecF{});
  }
}

}  // namespace

extern const DepthwiseKernels depthwise;
const DepthwiseKernels depthwise{
    .forward = forward, .weight_gradient = weight_gradient, .flush = flush};

}  // namespace torchweld::kernels::TORCHWELD_ISA
