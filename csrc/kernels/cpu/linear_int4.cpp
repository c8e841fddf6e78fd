// The int4 linear layer. A tile of rows and panels keeps the integer sums of one group in
// registers; at the end of the group they join the float sums of the tile. Integers are exact and
// groups come in order, so neither tile nor unrolling shows in the result.
#include "kernels/linear_int4.h"

#include "kernels/cpu/linear_epilogue.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kHalves = kPanelColumns / kLanesF;  // registers that hold a panel's columns

struct TileArgs {
  const int8_t* a;
  int64_t a_stride;
  const int32_t* group_sum;
  const uint8_t* b;
  const BFloat16* scale;
  const uint8_t* zero;
  int64_t groups;
  int64_t octets;  // of a group

  int64_t panel_stride() const { return groups * octets * 64; }
};

// What becomes of the sums of a group: either they join the float sums of the tile, or they are all
// that is asked for.
struct Totals {
  float* total;  // [rows][stride]
  int64_t stride;
  void add(const TileArgs& t, int64_t group, int r, int v, VecI32 sum) const {
    const BFloat16* scale = t.scale + (v / kHalves * t.groups + group) * kPanelColumns;
    float* to = total + r * stride + v * kLanesF;
    const VecF value = __builtin_convertvector(sum, VecF);
    store(to, fma(value, load(scale + v % kHalves * kLanesF), load(to)));
  }
};

struct GroupSums {
  int32_t* sums;  // [rows][groups][stride]
  int64_t stride;
  int64_t columns;
  void add(const TileArgs& t, int64_t group, int r, int v, VecI32 sum) const {
    int32_t* to = sums + (r * t.groups + group) * stride + v * kLanesF;
    const int64_t left = columns - v * kLanesF;
    if (left > 0) memcpy(to, &sum, (size_t)(left < kLanesF ? left * 4 : (int64_t)sizeof sum));
  }
};

// -zero * (sum of the activations): where the sums of a group start.
inline VecI32 start(const TileArgs& t, int64_t group, int r, int v) {
  const uint8_t* zero = t.zero + (v / kHalves * t.groups + group) * kPanelColumns;
  VecU8 bytes;
  memcpy(&bytes, zero + v % kHalves * kLanesF, sizeof bytes);
  return (VecI32)widen(bytes) * -t.group_sum[r * t.groups + group];
}

// --- the sums of one group -----------------------------------------------------------------------
// Each instruction set defines its largest tile and tile<R, P>, which calls add for the sums of all
// groups, R rows and P panels.

#if defined(__AVX512VNNI__)

constexpr int kRows = 4;
constexpr int kPanels = 2;
constexpr int8_t kFlip = -128;  // how the rows' quantizer stores a byte

// Bytes of a panel to ask for ahead of their use. The hardware stops at the end of a page.
constexpr int64_t kAhead = 8192;

template <int R, int P, class Sink>
__attribute__((noinline)) void tile(const TileArgs& t, const Sink& sink) {
  // Few rows leave the multiplier waiting on its own result; more sums in flight hide that.
  constexpr int U = R * P <= 2 ? 2 : 1;
  const __m512i low_mask = _mm512_set1_epi8(0x0f), high_mask = _mm512_set1_epi8((char)0xf0);
  const int64_t panel_stride = t.panel_stride();
  const uint8_t* b = t.b;
  const int8_t* a = t.a;
  for (int64_t group = 0; group < t.groups; ++group) {
    const bool is_near = (group + 1) * t.octets * 64 + kAhead <= panel_stride;
    const uint8_t* ahead = b + kAhead + (is_near ? 0 : (P - 1) * panel_stride);
    const int64_t groups_ahead = kAhead / 64 / t.octets;
    UNROLL for (int p = 0; p < P; ++p) {
      const int64_t at = (p * t.groups + group + groups_ahead) * kPanelColumns;
      __builtin_prefetch(t.scale + at);
      __builtin_prefetch(t.zero + at);
    }
    // The high bits count 16 times; one exact shift a group takes that off their sums.
    __m512i low[U][R][P], high[U][R][P];
    UNROLL for (int u = 0; u < U; ++u) {
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int p = 0; p < P; ++p) {
          low[u][r][p] = u == 0 ? (__m512i)start(t, group, r, p) : _mm512_setzero_si512();
          high[u][r][p] = _mm512_setzero_si512();
          // Hides from GCC 12 that this is zero: it would spill the sums.
          __asm__("" : "+v"(high[u][r][p]), "+v"(low[u][r][p]));
        }
      }
    }
    const auto step = [&](int u) __attribute__((always_inline)) {
      __m512i l[P], h[P];
      UNROLL for (int p = 0; p < P; ++p) {
        __m512i bytes = _mm512_loadu_si512(b + p * panel_stride);
        __asm__("" : "+v"(bytes));  // else it is loaded twice, once for each mask
        __builtin_prefetch(ahead + p * panel_stride);
        l[p] = _mm512_and_si512(bytes, low_mask);
        h[p] = _mm512_and_si512(bytes, high_mask);
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const __m512i first = _mm512_set1_epi32(load_quad(a + r * t.a_stride));
        UNROLL for (int p = 0; p < P; ++p) {
          low[u][r][p] = _mm512_dpbusd_epi32(low[u][r][p], l[p], first);
        }
        const __m512i second = _mm512_set1_epi32(load_quad(a + r * t.a_stride + kQuad));
        UNROLL for (int p = 0; p < P; ++p) {
          high[u][r][p] = _mm512_dpbusd_epi32(high[u][r][p], h[p], second);
        }
      }
      b += 64;
      a += kOctet;
      ahead += 64;
    };
    int64_t octet = 0;
    for (; octet + U <= t.octets; octet += U) {
      UNROLL for (int u = 0; u < U; ++u) step(u);
    }
    for (; octet < t.octets; ++octet) step(0);
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int p = 0; p < P; ++p) {
        UNROLL for (int u = 1; u < U; ++u) {
          low[0][r][p] = _mm512_add_epi32(low[0][r][p], low[u][r][p]);
          high[0][r][p] = _mm512_add_epi32(high[0][r][p], high[u][r][p]);
        }
        const __m512i exact = _mm512_srai_epi32(high[0][r][p], 4);
        sink.add(t, group, r, p, (VecI32)_mm512_add_epi32(low[0][r][p], exact));
      }
    }
  }
}

#elif defined(__AVX2__)

constexpr int8_t kFlip = 0;

#if defined(__AVX512BW__)
constexpr int kRows = 4;
constexpr int kPanels = 2;
typedef __m512i Bytes;
inline Bytes set_quads(int32_t quad) { return _mm512_set1_epi32(quad); }
inline Bytes low_bits(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(0x0f)); }
inline Bytes high_bits(Bytes v) { return low_bits(_mm512_srli_epi16(v, 4)); }
inline Bytes pairs(Bytes u, Bytes s) { return _mm512_maddubs_epi16(u, s); }
inline Bytes add_pairs(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline VecI32 quads(Bytes v) { return (VecI32)_mm512_madd_epi16(v, _mm512_set1_epi16(1)); }
#else
constexpr int kRows = 2;
constexpr int kPanels = 1;
typedef __m256i Bytes;
inline Bytes set_quads(int32_t quad) { return _mm256_set1_epi32(quad); }
inline Bytes low_bits(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(0x0f)); }
inline Bytes high_bits(Bytes v) { return low_bits(_mm256_srli_epi16(v, 4)); }
inline Bytes pairs(Bytes u, Bytes s) { return _mm256_maddubs_epi16(u, s); }
inline Bytes add_pairs(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline VecI32 quads(Bytes v) { return (VecI32)_mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
#endif

// Pairs of products lie within 2 * 15 * 127 = 3810, and eight of them fit int16.
constexpr int64_t kOctetsInPairs = 4;

template <int R, int P, class Sink>
__attribute__((noinline)) void tile(const TileArgs& t, const Sink& sink) {
  constexpr int V = P * kHalves;
  const int64_t panel_stride = t.panel_stride();
  const uint8_t* b = t.b;
  const int8_t* a = t.a;
  for (int64_t group = 0; group < t.groups; ++group) {
    VecI32 sum[R][V];
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int v = 0; v < V; ++v) sum[r][v] = start(t, group, r, v);
    }
    for (int64_t left = t.octets; left > 0; left -= kOctetsInPairs) {
      Bytes pair[R][V] = {};
      for (int64_t i = left < kOctetsInPairs ? left : kOctetsInPairs; i > 0; --i) {
        UNROLL for (int v = 0; v < V; ++v) {
          Bytes bytes;
          memcpy(&bytes, b + v / kHalves * panel_stride + v % kHalves * sizeof bytes, sizeof bytes);
          const Bytes low = low_bits(bytes), high = high_bits(bytes);
          UNROLL for (int r = 0; r < R; ++r) {
            const int8_t* octet = a + r * t.a_stride;
            const Bytes first = pairs(low, set_quads(load_quad(octet)));
            const Bytes second = pairs(high, set_quads(load_quad(octet + kQuad)));
            pair[r][v] = add_pairs(pair[r][v], add_pairs(first, second));
          }
        }
        b += 64;
        a += kOctet;
      }
      UNROLL for (int r = 0; r < R; ++r) {
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] += quads(pair[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int v = 0; v < V; ++v) sink.add(t, group, r, v, sum[r][v]);
    }
  }
}

#else

constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int8_t kFlip = 0;

template <int R, int P, class Sink>
void tile(const TileArgs& t, const Sink& sink) {
  for (int r = 0; r < R; ++r) {
    const uint8_t* b = t.b;
    const int8_t* a = t.a + r * t.a_stride;
    for (int64_t group = 0; group < t.groups; ++group) {
      int32_t sum[kPanelColumns] = {};
      for (int64_t octet = 0; octet < t.octets; ++octet, a += kOctet) {
        for (int n = 0; n < kPanelColumns; ++n, b += kQuad) {
          for (int i = 0; i < kQuad; ++i) sum[n] += a[i] * (b[i] & 15) + a[kQuad + i] * (b[i] >> 4);
        }
      }
      for (int v = 0; v < kHalves; ++v) {
        VecI32 part;
        memcpy(&part, sum + v * kLanesF, sizeof part);
        sink.add(t, group, r, v, part + start(t, group, r, v));
      }
    }
  }
}

#endif

// --- rows and panels -----------------------------------------------------------------------------

// The tile compiled for exactly this many rows and panels.
template <int R, int P, class Sink>
inline void any_tile(int64_t rows, int64_t panels, const TileArgs& args, const Sink& sink) {
  if constexpr (P > 1) {
    if (panels < P) return any_tile<R, P - 1>(rows, panels, args, sink);
  }
  if constexpr (R > 1) {
    if (rows < R) return any_tile<R - 1, P>(rows, panels, args, sink);
  }
  tile<R, P>(args, sink);
}

// f(row, rows, column, columns, tile) for all tiles, where tile(sink) computes it. Panels outside,
// rows inside: a group of panels stays in the second cache while all rows pass.
template <class F>
void for_each_tile(const LinearInt4Block& block, const F& f) {
  // A single row reads as fast as memory is: panel by panel, one stream.
  const int64_t tile_columns = (block.rows == 1 ? 1 : kPanels) * kPanelColumns;
  TileArgs args{.a = nullptr,
                .a_stride = block.quantized_stride,
                .group_sum = nullptr,
                .b = block.panels,
                .scale = block.weight_scale,
                .zero = block.weight_zero,
                .groups = block.groups,
                .octets = block.group_size / kOctet};
  for (int64_t column = 0; column < block.columns; column += tile_columns) {
    const int64_t rest = block.columns - column;
    const int64_t columns = rest < tile_columns ? rest : tile_columns;
    const int64_t panels = (columns + kPanelColumns - 1) / kPanelColumns;
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rows = block.rows - row < kRows ? block.rows - row : kRows;
      args.a = block.quantized + row * block.quantized_stride;
      args.group_sum = block.group_sum + row * block.groups;
      f(row, rows, column, columns,
        [&](const auto& sink) { any_tile<kRows, kPanels>(rows, panels, args, sink); });
    }
    args.b += panels * args.panel_stride();
    args.scale += panels * block.groups * kPanelColumns;
    args.zero += panels * block.groups * kPanelColumns;
  }
}

template <class T>
void multiply(const LinearInt4Block& block) {
  constexpr int64_t kTileColumns = kPanels * kPanelColumns;
  for_each_tile(block,
                [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const auto& run) {
                  alignas(64) float total[kRows * kTileColumns] = {};
                  const LinearTile<float> tile{.sum = total,
                                               .stride = kTileColumns,
                                               .row = row,
                                               .rows = rows,
                                               .column = column,
                                               .columns = columns};
                  fetch_residual<T, float>(block.epilogue, tile);
                  run(Totals{.total = total, .stride = kTileColumns});
                  finish<T, float>(block.epilogue, tile);
                });
}

void accumulate(const LinearInt4Block& block, int32_t* sums, int64_t stride) {
  for_each_tile(block, [&](int64_t row, int64_t, int64_t column, int64_t columns, const auto& run) {
    run(GroupSums{
        .sums = sums + row * block.groups * stride + column, .stride = stride, .columns = columns});
  });
}

// --- activations ---------------------------------------------------------------------------------

void prepare(const PrepareInt4Rows& rows) {
  for (int64_t r = 0; r < rows.rows; ++r) {
    int8_t* row = rows.quantized + r * rows.quantized_stride;
    const int64_t size = rows.groups * rows.group_size;
    for (int64_t k = 0; k < rows.in_features; ++k) row[k] ^= kFlip;
    memset(row + rows.in_features, 0, (size_t)(size - rows.in_features));
    for (int64_t group = 0; group < rows.groups; ++group) {
      int32_t sum = 0;
      for (int64_t k = 0; k < rows.group_size; ++k) sum += row[group * rows.group_size + k];
      rows.group_sum[r * rows.groups + group] = sum;
    }
  }
}

}  // namespace

extern const LinearInt4Kernels linear_int4;
const LinearInt4Kernels linear_int4{
    .prepare = prepare,
    .multiply = {multiply<float>, nullptr, multiply<BFloat16>, multiply<Float16>},
    .accumulate = accumulate,
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
