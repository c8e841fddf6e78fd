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

// Fetches a stretch of memory in as many equal portions as there will be tiles. Into the first
// cache level, for all that it evicts: fetching to the second alone ran at three quarters of the
// bandwidth.
class Ahead {
 public:
  Ahead(const DepthwiseAhead& ahead, int64_t tiles)
      : next_((const char*)ahead.data),
        left_(ahead.size),
        portion_((left_ / (tiles > 0 ? tiles : 1) / 64 + 1) * 64) {}

  template <bool kWrite>
  void fetch() {
    const int64_t size = portion_ < left_ ? portion_ : left_;
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(next_ + i, kWrite, 3);
    next_ += size;
    left_ -= size;
  }

 private:
  const char* next_;
  int64_t left_;
  int64_t portion_;
};

int64_t registers(int64_t channels) { return (channels + kLanesF - 1) / kLanesF; }

// f(c, row, Whole or Part): all rows for a cache line of channels before the next line, so what the
// next row needs again is still in the first cache level.
template <class F>
__attribute__((always_inline)) inline void for_each_register_of_rows(int64_t channels, int64_t rows,
                                                                     const F& f) {
  for (int64_t line = 0; line < channels; line += kDepthwiseGroup) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = line; c < line + kDepthwiseGroup && c < channels; c += kLanesF) {
        if (c + kLanesF <= channels) {
          f(c, row, Whole{});
        } else {
          f(c, row, Part{channels - c});
        }
      }
    }
  }
}

// Keeps a value that several multiply-adds share in its register: GCC would load it anew for each.
inline VecF in_register(VecF value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#endif
  return value;
}

// --- forward -------------------------------------------------------------------------------------
// A store may change anything, so what the loops need of `e` is copied first.
template <int kPixels, class T, class P>
__attribute__((always_inline)) inline void finish(const EpilogueOf<T>& e, VecF (&sums)[kPixels],
                                                  int64_t offset, int64_t step, int64_t c,
                                                  T* output, bool streamed, P part) {
  if (e.bias != nullptr) {
    const VecF bias = load(e.bias + c, part);
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t) sums[t] += bias;
  }
  if (e.residual != nullptr) {
    const T* residual = e.residual + offset;
#pragma GCC unroll 16
    for (int t = 0; t < kPixels; ++t, residual += step) sums[t] += load(residual, part);
  }
  const VecF low = broadcast<VecF>(e.low), high = broadcast<VecF>(e.high);
  T* to = output + offset;
#pragma GCC unroll 16
  for (int t = 0; t < kPixels; ++t, to += step) {
    VecF value = sums[t];
    value = value < low ? low : value;
    value = value > high ? high : value;
    if (streamed) {
      stream(to, value, part);
    } else {
      store(to, value, part);
    }
  }
}

// kPixels outputs of row p from pixel q on, of the channels from c on. kTaps and kStep are zero
// where they are not known before the call. Unless kInside, taps outside the row are left out.
template <int kPixels, int kTaps, int kStep, bool kInside, class T, class P>
__attribute__((noinline)) void tile(const DepthwiseForwardOf<T>& d, int64_t c, int64_t p, int64_t q,
                                    P part) {
  const DepthwiseTapsOf<T>& taps = d.taps;
  const int64_t channels = taps.channels;
  const int64_t from = taps.first + q * (kStep > 0 ? kStep : taps.step);
  const auto inside = [&](int64_t pixel) {
    return kInside || (uint64_t)pixel < (uint64_t)taps.width;
  };
  VecF sums[kPixels];
#pragma GCC unroll 16
  for (int t = 0; t < kPixels; ++t) sums[t] = VecF{};

  const float* w = d.weight + c / kDepthwiseGroup * kDepthwiseGroup * taps.rows * taps.taps +
                   c % kDepthwiseGroup;
  const T* const* input = taps.input + p * taps.row_step;
  for (int64_t r = 0; r < taps.rows; ++r, w += taps.taps * kDepthwiseGroup) {
    const T* row = input[r * taps.row_tap_step];
    if (row == nullptr) continue;
    if constexpr (kTaps > 0) {
      VecF weights[kTaps];
#pragma GCC unroll 8
      for (int s = 0; s < kTaps; ++s) weights[s] = load(w + s * kDepthwiseGroup);
      // Every input pixel is loaded once and meets all the outputs it has a part in.
      const T* x = row + from * channels + c;
#pragma GCC unroll 48
      for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j, x += channels) {
        if (!inside(from + j)) continue;
        const VecF value = in_register(load(x, part));
#pragma GCC unroll 8
        for (int s = 0; s < kTaps; ++s) {
          const int t = (j - s) / (kStep > 0 ? kStep : 1);
          if (j >= s && t < kPixels && t * kStep == j - s) {
            sums[t] = fma(value, weights[s], sums[t]);
          }
        }
      }
    } else {
      for (int64_t s = 0; s < taps.taps; ++s) {
        const VecF weight = load(w + s * kDepthwiseGroup);
#pragma GCC unroll 16
        for (int t = 0; t < kPixels; ++t) {
          const int64_t pixel = from + t * taps.step + s * taps.tap_step;
          if (!inside(pixel)) continue;
          sums[t] = fma(load(row + pixel * channels + c, part), weight, sums[t]);
        }
      }
    }
  }
  finish(d.epilogue, sums, p * d.output_row + q * d.output_step + c, d.output_step, c, d.output,
         d.streamed, part);
}

// Tiles of kPixels from pixel q on.
template <int kPixels, int kTaps, int kStep, class T, class P>
int64_t tiles(const DepthwiseForwardOf<T>& d, int64_t c, int64_t p, int64_t q, P part, Ahead& input,
              Ahead& output) {
  constexpr bool kWorthwhile = kTaps > 0 && kPixels >= 7;
  for (; q + kPixels <= d.width; q += kPixels) {
    const int64_t from = d.taps.first + q * kStep;
    const bool inside =
        kWorthwhile && from >= 0 && from + (kPixels - 1) * kStep + kTaps <= d.taps.width;
    input.fetch<false>();
    output.fetch<true>();
    if (inside) {
      tile<kPixels, kTaps, kStep, kWorthwhile>(d, c, p, q, part);
    } else {
      tile<kPixels, kTaps, kStep, false>(d, c, p, q, part);
    }
  }
  return q;
}

template <int kTaps, int kStep, class T>
void forward_rows(const DepthwiseForwardOf<T>& d) {
  const int64_t count =
      d.height * registers(d.taps.channels) * ((d.width + kWidestTile - 1) / kWidestTile);
  Ahead input(d.input_ahead, count), output(d.output_ahead, count);
  for_each_register_of_rows(d.taps.channels, d.height, [&](int64_t c, int64_t p, auto part) {
    int64_t q = 0;
    if constexpr (kWidestTile > 7) {
      q = tiles<kWidestTile, kTaps, kStep>(d, c, p, q, part, input, output);
    }
    q = tiles<7, kTaps, kStep>(d, c, p, q, part, input, output);
    q = tiles<3, kTaps, kStep>(d, c, p, q, part, input, output);
    tiles<1, kTaps, kStep>(d, c, p, q, part, input, output);
  });
}

template <class T>
void run_forward(const DepthwiseForwardOf<T>& d) {
  const auto is = [&](int64_t taps, int64_t step) {
    return d.taps.taps == taps && d.taps.step == step && (d.taps.tap_step == 1 || taps == 1);
  };
  if (is(3, 1)) return forward_rows<3, 1>(d);
  if (is(3, 2)) return forward_rows<3, 2>(d);
  if (is(5, 1)) return forward_rows<5, 1>(d);
  if (is(5, 2)) return forward_rows<5, 2>(d);
  if (is(7, 1)) return forward_rows<7, 1>(d);
  // Those of a gradient with stride 2.
  if (is(1, 1)) return forward_rows<1, 1>(d);
  if (is(2, 1)) return forward_rows<2, 1>(d);
  forward_rows<0, 0>(d);
}

// Parts of a line would each be a write to memory of their own.
template <class T>
bool can_stream(const DepthwiseForwardOf<T>& d) {
  const uint64_t steps = (uint64_t)d.output_step | (uint64_t)d.output_row;
  return sizeof(T) * kLanesF == 64 && ((uint64_t)d.output | steps * sizeof(T)) % 64 == 0;
}

template <class T>
void forward(const DepthwiseForwardOf<T>& arguments) {
  DepthwiseForwardOf<T> d = arguments;
  d.streamed = d.streamed && can_stream(d);
  if (d.streamed) d.output_ahead = {};  // which would bring into the cache what goes past it
  run_forward(d);
  if (d.streamed) drain();
}

// --- gradient of the weight ----------------------------------------------------------------------
float* sums_of(const DepthwiseWeightGradient& d, int64_t c, int64_t r) {
  const int64_t taps = c / kDepthwiseGroup * d.taps.rows * d.taps.taps + r * d.taps.taps;
  return d.sums + taps * kDepthwiseGroup + c % kDepthwiseGroup;
}

// The sums of kRows x kTaps weights stay in registers along a row of output pixels.
template <int kRows, int kTaps, int kStep, class P>
__attribute__((noinline)) void gradient_row(const DepthwiseWeightGradient& d, int64_t c, int64_t p,
                                            int64_t row, P part, Ahead& ahead) {
  const int64_t channels = d.taps.channels, first = d.taps.first, width = d.taps.width;
  const float* grad = d.grad[p] + c;
  const float* input[kRows];
  VecF sums[kRows][kTaps];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    input[r] = d.taps.input[p * d.taps.row_step + (row + r) * d.taps.row_tap_step] + c;
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s) sums[r][s] = VecF{};
  }

  // Two pixels at a time share the input pixels between them.
  const auto pixels = [&](int64_t q, auto count, auto inside) __attribute__((always_inline)) {
    constexpr int kPixels = decltype(count)::value;
    VecF g[kPixels];
#pragma GCC unroll 4
    for (int t = 0; t < kPixels; ++t) g[t] = load(grad + (q + t) * channels, part);
    const int64_t from = first + q * kStep;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float* x = input[r] + from * channels;
#pragma GCC unroll 16
      for (int j = 0; j < (kPixels - 1) * kStep + kTaps; ++j, x += channels) {
        if (!inside.value && (uint64_t)(from + j) >= (uint64_t)width) continue;
        const VecF value = in_register(load(x, part));
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
  const int64_t last = end < d.width ? end : d.width;
  int64_t q = 0;
  for (; q < begin && q < d.width; ++q) pixels(q, Constant<1>{}, Constant<false>{});
  for (; q + 2 <= last; q += 2) {
    ahead.fetch<false>();
    pixels(q, Constant<2>{}, Constant<true>{});
  }
  for (; q < d.width; ++q) pixels(q, Constant<1>{}, Constant<false>{});

  float* to = sums_of(d, c, row);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int s = 0; s < kTaps; ++s, to += kDepthwiseGroup) store(to, load(to) + sums[r][s]);
  }
}

// Any taps: one sum at a time.
template <class P>
void gradient_row_any(const DepthwiseWeightGradient& d, int64_t c, int64_t p, int64_t r, P part) {
  const DepthwiseTaps& taps = d.taps;
  const float* row = taps.input[p * taps.row_step + r * taps.row_tap_step] + c;
  const float* grad = d.grad[p] + c;
  float* to = sums_of(d, c, r);
  for (int64_t s = 0; s < taps.taps; ++s, to += kDepthwiseGroup) {
    VecF sum{};
    for (int64_t q = 0; q < d.width; ++q) {
      const int64_t pixel = taps.first + q * taps.step + s * taps.tap_step;
      if ((uint64_t)pixel >= (uint64_t)taps.width) continue;
      sum = fma(load(row + pixel * taps.channels, part), load(grad + q * taps.channels, part), sum);
    }
    store(to, load(to) + sum);
  }
}

template <int kRows, int kTaps, int kStep>
void gradient_rows(const DepthwiseWeightGradient& d) {
  const DepthwiseTaps& taps = d.taps;
  Ahead ahead(d.input_ahead, d.height * registers(taps.channels) * (d.width / 2));
  for_each_register_of_rows(taps.channels, d.height, [&](int64_t c, int64_t p, auto part) {
    const float* const* input = taps.input + p * taps.row_step;
    for (int64_t r = 0; r < taps.rows;) {
      int64_t count = 0;
      while (count < (kRows > 0 ? kRows : 1) && r + count < taps.rows &&
             input[(r + count) * taps.row_tap_step] != nullptr) {
        ++count;
      }
      if constexpr (kRows == 0) {
        if (count > 0) gradient_row_any(d, c, p, r, part);
        ++r;
      } else if (count == kRows) {
        gradient_row<kRows, kTaps, kStep>(d, c, p, r, part, ahead);
        r += kRows;
      } else {
        if (count > 0) gradient_row<1, kTaps, kStep>(d, c, p, r, part, ahead);
        ++r;
      }
    }
  });
}

void weight_gradient(const DepthwiseWeightGradient& d) {
#if defined(__AVX512F__)
  constexpr int kRowsOfFive = 5;
#else
  constexpr int kRowsOfFive = 2;  // with 16 registers
#endif
  const auto is = [&](int64_t taps, int64_t step) {
    return d.taps.taps == taps && d.taps.step == step && d.taps.tap_step == 1;
  };
  if (is(3, 1)) return gradient_rows<3, 3, 1>(d);
  if (is(3, 2)) return gradient_rows<3, 3, 2>(d);
  if (is(5, 1)) return gradient_rows<kRowsOfFive, 5, 1>(d);
  if (is(5, 2)) return gradient_rows<kRowsOfFive, 5, 2>(d);
  gradient_rows<0, 0, 0>(d);
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
    .forward = forward<float>,
    .forward_bf16 = forward<BFloat16>,
    .weight_gradient = weight_gradient,
    .flush = flush,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
