#include "kernels/max_pool2d.h"

#include <math.h>

#include "kernels/cpu/loop.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define TORCHWELD_ALWAYS_INLINE __attribute__((always_inline)) inline

template <class F>
TORCHWELD_ALWAYS_INLINE void for_each_register_of_channels(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + kLanesF <= channels; c += kLanesF) f(c, Whole{});
  if (c < channels) f(c, Part{channels - c});
}

// Asks for what the next row of the destination will need, a little with every pixel: the hardware
// does not look beyond a page, and a row of pixels is several.
inline void fetch(const void* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) __builtin_prefetch((const char*)from + i);
}

// --- bytes beside floats -------------------------------------------------------------------------
inline void store_positions(uint8_t* p, VecI32 positions, Whole) {
  const VecI8 bytes = low_bytes(positions);
  memcpy(p, &bytes, sizeof bytes);
}
inline VecU8 load_positions(const uint8_t* p, Whole) {
  VecU8 bytes;
  memcpy(&bytes, p, sizeof bytes);
  return bytes;
}
#if defined(__AVX512F__)
inline void store_positions(uint8_t* p, VecI32 positions, Part part) {
  _mm512_mask_cvtepi32_storeu_epi8(p, (__mmask16)((1u << part.count) - 1), (__m512i)positions);
}
inline VecU8 load_positions(const uint8_t* p, Part part) {
  return (VecU8)_mm_maskz_loadu_epi8((__mmask16)((1u << part.count) - 1), p);
}
#else
inline void store_positions(uint8_t* p, VecI32 positions, Part part) {
  for (int64_t i = 0; i < part.count; ++i) p[i] = (uint8_t)positions[i];
}
inline VecU8 load_positions(const uint8_t* p, Part part) {
  VecU8 bytes{};
  for (int64_t i = 0; i < part.count; ++i) bytes[i] = p[i];
  return bytes;
}
#endif

struct Best {
  VecF value;
  VecI32 position;
};

// Left to its vector extension, GCC 12 takes masks of AVX-512 to registers and back.
template <bool kPositions>
TORCHWELD_ALWAYS_INLINE void take_greater(Best& best, VecF value, int32_t position) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)value;
  const __mmask16 take = _mm512_cmp_ps_mask(v, (__m512)best.value, _CMP_GT_OQ) |
                         _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  best.value = (VecF)_mm512_mask_mov_ps((__m512)best.value, take, v);
  if (kPositions) {
    best.position = (VecI32)_mm512_mask_set1_epi32((__m512i)best.position, take, position);
  }
#else
  const VecI32 take = (value > best.value) | (value != value);
  best.value = take ? value : best.value;
  if (kPositions) best.position = take ? broadcast<VecI32>(position) : best.position;
#endif
}

// sum + value in the lanes whose position is the given one.
TORCHWELD_ALWAYS_INLINE VecF add_where(VecF sum, VecU8 positions, int64_t position, VecF value) {
#if defined(__AVX512F__)
  const __mmask16 here = _mm_cmpeq_epi8_mask((__m128i)positions, _mm_set1_epi8((char)position));
  return (VecF)_mm512_mask_add_ps((__m512)sum, here, (__m512)sum, (__m512)value);
#else
  const VecI32 here = (VecI32)widen(positions) == broadcast<VecI32>((int32_t)position);
  return here ? sum + value : sum;
#endif
}

// --- forward -------------------------------------------------------------------------------------
// kRows and kColumns are the taps of a whole window, zero where they are not known before the call.
template <bool kPositions, int kRows, int kColumns, class T>
TORCHWELD_ALWAYS_INLINE void forward_pixel(const MaxPool2dOf<T>& d, const PoolRun& row,
                                           const PoolRun& column, T* to, uint8_t* positions) {
  const int64_t channels = d.channels, taps = kColumns > 0 ? kColumns : d.columns.taps;
  const int64_t row_step = d.rows.step * d.source_width * channels;
  const int64_t step = d.columns.step * channels;
  const T* from = d.source + (row.first * d.source_width + column.first) * channels;
  const int64_t first = row.tap * taps + column.tap;
  for_each_register_of_channels(channels, [&](int64_t c, auto part) {
    Best best{broadcast<VecF>(-INFINITY), broadcast<VecI32>((int32_t)first)};
    if constexpr (kRows > 0) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int s = 0; s < kColumns; ++s) {
          const VecF value = load(from + r * row_step + s * step + c, part);
          take_greater<kPositions>(best, value, r * kColumns + s);
        }
      }
    } else {
      for (int64_t r = 0; r < row.count; ++r) {
        for (int64_t s = 0; s < column.count; ++s) {
          const VecF value = load(from + r * row_step + s * step + c, part);
          take_greater<kPositions>(best, value, (int32_t)(first + r * taps + s));
        }
      }
    }
    store(to + c, best.value, part);
    if (kPositions) store_positions(positions + c, best.position, part);
  });
}

// Windows of kRows x kColumns taps, or any; the ones cut off by a border are always any.
template <bool kPositions, int kRows, int kColumns, class T>
void forward_rows(const MaxPool2dOf<T>& d, uint8_t* positions) {
  const int64_t channels = d.channels;
  for (int64_t p = d.begin; p < d.end; ++p) {
    const PoolRun row = d.rows.runs[p];
    const bool whole = kRows > 0 && row.count == kRows;
    int64_t at = p * d.width * channels;
    const PoolRun next = d.rows.runs[p + 1 < d.end ? p + 1 : p];
    const T* ahead = d.source + (row.first + row.count) * d.source_width * channels;
    const int64_t rows = next.first + next.count - row.first - row.count;
    const int64_t share = rows * d.source_width * channels / d.width;
    for (int64_t q = 0; q < d.width; ++q, at += channels) {
      const PoolRun column = d.columns.runs[q];
      fetch(ahead + q * share, share * (int64_t)sizeof(T));
      T* to = d.destination + at;
      uint8_t* position = kPositions ? positions + at : nullptr;
      if (whole && column.count == kColumns) {
        forward_pixel<kPositions, kRows, kColumns>(d, row, column, to, position);
      } else {
        forward_pixel<kPositions, 0, 0>(d, row, column, to, position);
      }
    }
  }
}

template <bool kPositions, class T>
void forward_windows(const MaxPool2dOf<T>& d, uint8_t* positions) {
  const auto is = [&](int64_t taps) { return d.rows.taps == taps && d.columns.taps == taps; };
  if (is(2)) return forward_rows<kPositions, 2, 2>(d, positions);
  if (is(3)) return forward_rows<kPositions, 3, 3>(d, positions);
  forward_rows<kPositions, 0, 0>(d, positions);
}

template <class T>
void forward(const MaxPool2dOf<T>& d, uint8_t* positions) {
  if (positions != nullptr) {
    forward_windows<true>(d, positions);
  } else {
    forward_windows<false>(d, positions);
  }
}

// --- backward ------------------------------------------------------------------------------------
template <class T>
void backward_pixel(const MaxPool2dOf<T>& d, const PoolRun& row, const PoolRun& column,
                    const uint8_t* positions, T* to) {
  const int64_t channels = d.channels, taps = d.columns.taps;
  const int64_t row_step = d.rows.step * d.source_width * channels;
  const int64_t step = d.columns.step * channels;
  const int64_t row_tap_step = d.rows.tap_step * taps, tap_step = d.columns.tap_step;
  const int64_t from = (row.first * d.source_width + column.first) * channels;
  const int64_t first = row.tap * taps + column.tap;
  for_each_register_of_channels(channels, [&](int64_t c, auto part) {
    VecF sum{};
    for (int64_t r = 0; r < row.count; ++r) {
      for (int64_t s = 0; s < column.count; ++s) {
        const int64_t at = from + r * row_step + s * step + c;
        sum = add_where(sum, load_positions(positions + at, part),
                        first + r * row_tap_step + s * tap_step, load(d.source + at, part));
      }
    }
    store(to + c, sum, part);
  });
}

// Two neighbours, the first of which tap 0 of window `window` meets: so do kTaps - 1 taps of a
// stride of 2, and the last tap of the window before.
template <int kRows, int kTaps, class T>
TORCHWELD_ALWAYS_INLINE void backward_pair(const MaxPool2dOf<T>& d, const PoolRun& row,
                                           int64_t window, const uint8_t* positions, T* to) {
  const int64_t channels = d.channels, from = (row.first * d.source_width + window) * channels;
  for_each_register_of_channels(channels, [&](int64_t c, auto part) {
    VecF left{}, right{};
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = from + r * d.source_width * channels + c;
      const int64_t tap = (row.tap + r * d.rows.tap_step) * kTaps;
      if constexpr (kTaps == 3) {
        left = add_where(left, load_positions(positions + at - channels, part), tap + 2,
                         load(d.source + at - channels, part));
      }
      const VecU8 position = load_positions(positions + at, part);
      const VecF grad = load(d.source + at, part);
      left = add_where(left, position, tap, grad);
      right = add_where(right, position, tap + 1, grad);
    }
    store(to + c, left, part);
    store(to + channels + c, right, part);
  });
}

// kTaps is zero where windows have not 2 or 3 taps and a stride of 2 along a row of pixels.
template <int kRows, int kTaps, class T>
void backward_row(const MaxPool2dOf<T>& d, const PoolRun& row, const uint8_t* positions, T* to) {
  for (int64_t q = 0; q < d.width;) {
    const int64_t place = q + d.columns.padding, window = place / 2;
    if (kTaps > 0 && place % 2 == 0 && q + 1 < d.width && window < d.source_width &&
        window >= kTaps - 2) {
      backward_pair<kRows, kTaps>(d, row, window, positions, to + q * d.channels);
      q += 2;
    } else {
      backward_pixel(d, row, d.columns.runs[q], positions, to + q * d.channels);
      q += 1;
    }
  }
}

template <int kTaps, class T>
void backward_rows(const MaxPool2dOf<T>& d, const uint8_t* positions) {
  for (int64_t p = d.begin; p < d.end; ++p) {
    const PoolRun row = d.rows.runs[p];
    T* to = d.destination + p * d.width * d.channels;
    if (row.count == 1) {
      backward_row<1, kTaps>(d, row, positions, to);
    } else if (row.count == 2 && d.rows.step == 1) {
      backward_row<2, kTaps>(d, row, positions, to);
    } else {
      backward_row<0, 0>(d, row, positions, to);
    }
  }
}

template <class T>
void backward(const MaxPool2dOf<T>& d, const uint8_t* positions) {
  const bool halves = d.columns.stride == 2 && d.columns.dilation == 1;
  if (halves && d.columns.taps == 2) return backward_rows<2>(d, positions);
  if (halves && d.columns.taps == 3) return backward_rows<3>(d, positions);
  backward_rows<0>(d, positions);
}

}  // namespace

extern const MaxPool2dKernels max_pool2d;
const MaxPool2dKernels max_pool2d{
    .forward = forward<float>,
    .forward_bf16 = forward<BFloat16>,
    .backward = backward<float>,
    .backward_bf16 = backward<BFloat16>,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
