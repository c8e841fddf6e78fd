// The int4 linear layer with many rows. The high bits are shifted down, once for all rows of a
// tile, so that both halves of a byte meet in one sum: half the sums of the tile for few rows, and
// so twice the rows. An output and group cost the multipliers group_size / 4 products and two more,
// zeros and scale; about a tenth of the time goes into what else a group's end is.
#pragma once

#include "kernels/cpu/linear_epilogue.h"
#include "kernels/linear_int4.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#if defined(__AVX512VNNI__)

// As many panels beside so many rows as leave room for their sums.
constexpr int kRowsTall = 8;
constexpr int panels_beside(int64_t rows) { return rows <= 6 ? 4 : 3; }
// Shorter groups: their sums leave the registers so often that half as many, kept there, are
// faster.
constexpr int64_t kTallGroup = 64;
constexpr int64_t kTallAhead = 4096;  // bytes
constexpr int kTallSums = kRowsTall * 4 * kPanelColumns;

struct TallArgs {
  const int8_t* a;
  int64_t a_stride;
  const uint8_t* b;
  int64_t panel_stride;
  int64_t octets;
  int64_t ahead;  // bytes to what the second cache is to fetch
  int32_t* c;     // [rows][panels * 16]
};

// Sums of one group, zeros not taken off. On their own, as GCC 12 spills them in a loop of groups.
template <int R, int P>
__attribute__((noinline)) void tall_tile(const TallArgs& t) {
#define UNROLL_TALL _Pragma("GCC unroll 16")
  const __m512i low_bits = _mm512_set1_epi8(0x0f);
  __m512i sum[R][P];
  UNROLL_TALL for (int r = 0; r < R; ++r) {
    UNROLL_TALL for (int p = 0; p < P; ++p) {
      sum[r][p] = _mm512_setzero_si512();
      __asm__("" : "+v"(sum[r][p]));  // hides from GCC 12 that this is known: it would spill
    }
  }
  // Four of the eight k of an octet.
  const auto quads = [&](const __m512i(&weight)[P],
                         const int8_t* from) __attribute__((always_inline)) {
    UNROLL_TALL for (int r = 0; r < R; ++r) {
      const __m512i left = _mm512_set1_epi32(load_quad(from + r * t.a_stride));
      UNROLL_TALL for (int p = 0; p < P; ++p) {
        sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], weight[p], left);
      }
    }
  };
  for (int64_t octet = 0; octet < t.octets; ++octet) {
    const uint8_t* b = t.b + octet * 64;
    const int8_t* a = t.a + octet * kOctet;
    __m512i low[P], high[P];
    UNROLL_TALL for (int p = 0; p < P; ++p) {
      low[p] = _mm512_and_si512(_mm512_loadu_si512(b + p * t.panel_stride), low_bits);
      _mm_prefetch(b + p * t.panel_stride + t.ahead, _MM_HINT_T1);
    }
    quads(low, a);
    UNROLL_TALL for (int p = 0; p < P; ++p) {
      const __m512i bytes = _mm512_loadu_si512(b + p * t.panel_stride);
      high[p] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low_bits);
    }
    quads(high, a + kQuad);
  }
  int32_t* c = t.c;
  UNROLL_TALL for (int r = 0; r < R; ++r) {
    UNROLL_TALL for (int p = 0; p < P; ++p, c += kPanelColumns) _mm512_storeu_si512(c, sum[r][p]);
  }
#undef UNROLL_TALL
}

template <int R, int P>
inline void tall_tile_of_rows(int64_t panels, const TallArgs& args) {
  if constexpr (P > 1) {
    if (panels < P) return tall_tile_of_rows<R, P - 1>(panels, args);
  }
  tall_tile<R, P>(args);
}
template <int R = kRowsTall>
inline void any_tall_tile(int64_t rows, int64_t panels, const TallArgs& args) {
  if constexpr (R > 1) {
    if (rows < R) return any_tall_tile<R - 1>(rows, panels, args);
  }
  tall_tile_of_rows<R, panels_beside(R)>(panels, args);
}

// Sums of all groups, each with its zeros taken off and times its scales.
inline void sum_groups(const LinearInt4Block& block, int64_t row, int64_t rows, int64_t panel,
                       int64_t panels, float* total) {
  alignas(64) int32_t sums[kTallSums];
  const int64_t groups = block.groups, octets = block.group_size / kOctet;
  TallArgs args{.a = block.quantized + row * block.quantized_stride,
                .a_stride = block.quantized_stride,
                .b = block.panels + panel * groups * octets * 64,
                .panel_stride = groups * octets * 64,
                .octets = octets,
                .ahead = 0,
                .c = sums};
  // Sums that fit int16 are multiplied as such: a product of int32 takes ten times as long.
  const bool is_short = block.group_size * 127 <= INT16_MAX;
  memset(total, 0, (size_t)(rows * panels * kPanelColumns) * sizeof *total);
  for (int64_t group = 0; group < groups; ++group) {
    // Behind the last bytes of the panels come those of the next tile's.
    const bool is_near = (group + 1) * octets * 64 + kTallAhead <= args.panel_stride;
    args.ahead = kTallAhead + (is_near ? 0 : (panels - 1) * args.panel_stride);
    any_tall_tile(rows, panels, args);
    args.a += octets * kOctet;
    args.b += octets * 64;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t at = ((panel + p) * groups + group) * kPanelColumns;
      VecU8 bytes;
      memcpy(&bytes, block.weight_zero + at, sizeof bytes);
      const __m512i zeros = (__m512i)widen(bytes);
      const __m512i negative = _mm512_maskz_sub_epi16(0x55555555, _mm512_setzero_si512(), zeros);
      const VecF scale = load(block.weight_scale + at);
      const int32_t* group_sum = block.group_sum + row * groups + group;
      for (int64_t r = 0, i = p * kPanelColumns; r < rows; ++r, i += panels * kPanelColumns) {
        const __m512i left = _mm512_set1_epi32(group_sum[r * groups]);
        __m512i sum = _mm512_loadu_si512(sums + i);
        sum = is_short ? _mm512_dpwssd_epi32(sum, negative, left)
                       : _mm512_sub_epi32(sum, _mm512_mullo_epi32(zeros, left));
        store(total + i, fma(__builtin_convertvector((VecI32)sum, VecF), scale, load(total + i)));
      }
    }
  }
}

// Panels outside, rows inside, in tiles of about one height.
template <class T>
void multiply_tall(const LinearInt4Block& block) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t height = ceil_div(block.rows, ceil_div(block.rows, kRowsTall));
  const int64_t width = panels_beside(height), columns = width * kPanelColumns;
  alignas(64) float total[kTallSums];
  for (int64_t column = 0; column < block.columns; column += columns) {
    const int64_t rest = block.columns - column;
    const int64_t panels = rest < columns ? ceil_div(rest, kPanelColumns) : width;
    for (int64_t row = 0; row < block.rows; row += height) {
      const int64_t rows = block.rows - row < height ? block.rows - row : height;
      const LinearTile<float> tile{.sum = total,
                                   .stride = panels * kPanelColumns,
                                   .row = row,
                                   .rows = rows,
                                   .column = column,
                                   .columns = rest < columns ? rest : columns};
      fetch_residual<T, float>(block.epilogue, tile);
      sum_groups(block, row, rows, column / kPanelColumns, panels, total);
      finish<T, float>(block.epilogue, tile);
    }
  }
}

#endif

}  // namespace
}  // namespace torchweld::kernels::TORCHWELD_ISA
