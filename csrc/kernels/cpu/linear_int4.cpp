// The int4 linear layer. A tile of rows and panels keeps the integer sums of one group in
// registers; at the end of the group they join the float sums of the tile, kept there too. Integers
// are exact and groups come in order, so neither tile nor unrolling shows in the result.
#include "kernels/linear_int4.h"

#include "kernels/cpu/linear_epilogue.h"
#include "kernels/cpu/linear_int4_rows.h"

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
  int64_t octets;    // of a group
  int64_t distance;  // panels from each of the tile's to the next

  int64_t panel_stride() const { return distance * groups * octets * 64; }
  // Of scales and zeros: register v of the tile's columns, in a group.
  int64_t at(int64_t group, int v) const {
    return (v / kHalves * distance * groups + group) * kPanelColumns + v % kHalves * kLanesF;
  }
};

// What becomes of the sums of a group: either they join the float sums of the tile, or they are all
// that is asked for. A tile of R rows and V registers of columns makes itself a Tile<R, V>.
struct Totals {
  float* total;  // [rows][stride]
  int64_t stride;

  template <int R, int V>
  struct Tile {
    explicit Tile(const Totals& of) : to(of) {}
    void add(const TileArgs& t, int64_t group, int r, int v, VecI32 sum) {
      const VecF value = __builtin_convertvector(sum, VecF);
      total[r][v] = fma(value, load(t.scale + t.at(group, v)), total[r][v]);
    }
    void finish() const {
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(to.total + r * to.stride + v * kLanesF, total[r][v]);
      }
    }
    const Totals& to;
    VecF total[R][V] = {};
  };
};

struct GroupSums {
  int32_t* sums;  // [rows][groups][stride]
  int64_t stride;
  int64_t columns;

  template <int R, int V>
  struct Tile {
    explicit Tile(const GroupSums& of) : to(of) {}
    void add(const TileArgs& t, int64_t group, int r, int v, VecI32 sum) const {
      const int64_t column = v / kHalves * t.distance * kPanelColumns + v % kHalves * kLanesF;
      const int64_t left = to.columns - column;
      int32_t* at = to.sums + (r * t.groups + group) * to.stride + column;
      if (left > 0) memcpy(at, &sum, (size_t)(left < kLanesF ? left * 4 : (int64_t)sizeof sum));
    }
    void finish() const {}
    const GroupSums& to;
  };
};

// -zero * (sum of the activations): where the sums of a group start.
inline VecI32 start(const TileArgs& t, int64_t group, int r, int v) {
  VecU8 bytes;
  memcpy(&bytes, t.zero + t.at(group, v), sizeof bytes);
  return (VecI32)widen(bytes) * -t.group_sum[r * t.groups + group];
}

// --- the sums of one group -----------------------------------------------------------------------
// Each instruction set defines its largest tile and tile<R, P>, which calls add for the sums of all
// groups, R rows and P panels.

#if defined(__AVX512VNNI__)

constexpr int kRows = 4;
constexpr int kPanels = 2;
constexpr int8_t kFlip = -128;  // how the rows' quantizer stores a byte

// Bytes of all panels of a tile to ask for ahead of their use: with so much to compute between two
// loads the processor does not look far enough by itself.
constexpr int64_t kAhead = 8192;
constexpr int64_t kGroupsAhead = 16;  // the same of scales and zeros

template <int R, int P, class Sink>
__attribute__((noinline)) void tile(const TileArgs& t, const Sink& sink) {
  // Few rows leave the multiplier waiting on its own result; more sums in flight hide that.
  constexpr int U = R * P <= 2 ? 2 : 1;
  const __m512i low_mask = _mm512_set1_epi8(0x0f), high_mask = _mm512_set1_epi8((char)0xf0);
  const int64_t panel_stride = t.panel_stride(), octets = t.octets, groups = t.groups;
  const uint8_t* b = t.b;
  const int8_t* a = t.a;
  typename Sink::template Tile<R, P> sums(sink);
  // What comes behind a panel is the next to be read, unless it is the one beside it in the tile.
  const int64_t skip = t.distance == 1 ? (P - 1) * panel_stride : 0;
  for (int64_t group = 0; group < groups; ++group) {
    const bool is_near = (group + 1) * octets * 64 + kAhead / P <= panel_stride;
    const int64_t ahead = kAhead / P + (is_near ? 0 : skip);
    UNROLL for (int p = 0; p < P; ++p) {
      const int64_t at = t.at(group + kGroupsAhead / P, p);
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
        __builtin_prefetch(b + p * panel_stride + ahead);
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
    };
    int64_t octet = 0;
    for (; octet + U <= octets; octet += U) {
      UNROLL for (int u = 0; u < U; ++u) step(u);
    }
    for (; octet < octets; ++octet) step(0);
    UNROLL for (int r = 0; r < R; ++r) {
      UNROLL for (int p = 0; p < P; ++p) {
        UNROLL for (int u = 1; u < U; ++u) {
          low[0][r][p] = _mm512_add_epi32(low[0][r][p], low[u][r][p]);
          high[0][r][p] = _mm512_add_epi32(high[0][r][p], high[u][r][p]);
        }
        const __m512i exact = _mm512_srai_epi32(high[0][r][p], 4);
        sums.add(t, group, r, p, (VecI32)_mm512_add_epi32(low[0][r][p], exact));
      }
    }
  }
  sums.finish();
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
  typename Sink::template Tile<R, V> sums(sink);
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
      UNROLL for (int v = 0; v < V; ++v) sums.add(t, group, r, v, sum[r][v]);
    }
  }
  sums.finish();
}

#else

constexpr int kRows = 2;
constexpr int kPanels = 1;
constexpr int8_t kFlip = 0;

template <int R, int P, class Sink>
void tile(const TileArgs& t, const Sink& sink) {
  typename Sink::template Tile<R, P * kHalves> sums(sink);
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
        sums.add(t, group, r, v, part + start(t, group, r, v));
      }
    }
  }
  sums.finish();
}

#endif

// --- rows and panels -----------------------------------------------------------------------------

// The tile compiled for exactly this many rows and panels.
template <int R, int P, class Sink>
inline void tile_of_rows(int64_t panels, const TileArgs& args, const Sink& sink) {
  if constexpr (P > 1) {
    if (panels < P) return tile_of_rows<R, P - 1>(panels, args, sink);
  }
  tile<R, P>(args, sink);
}
template <int R = kRows, class Sink>
inline void any_tile(int64_t rows, int64_t panels, const TileArgs& args, const Sink& sink) {
  if constexpr (R > 1) {
    if (rows < R) return any_tile<R - 1>(rows, panels, args, sink);
  }
  tile_of_rows<R, kPanels>(panels, args, sink);
}

struct TileRange {
  int64_t row, rows;
  int64_t panel, panels, distance;  // so many panels, so far from each other
};

// f(range, tile) for all tiles, where tile(sink) computes it.
template <class F>
void for_each_tile(const LinearInt4Block& block, const F& f) {
  const int64_t panels = (block.columns + kPanelColumns - 1) / kPanelColumns;
  const int64_t octets = block.group_size / kOctet;
  const auto rows_of = [&](int64_t panel, int64_t count, int64_t distance) {
    const int64_t first = panel * block.groups;
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rest = block.rows - row, rows = rest < kRows ? rest : kRows;
      const TileArgs args{.a = block.quantized + row * block.quantized_stride,
                          .a_stride = block.quantized_stride,
                          .group_sum = block.group_sum + row * block.groups,
                          .b = block.panels + first * octets * 64,
                          .scale = block.weight_scale + first * kPanelColumns,
                          .zero = block.weight_zero + first * kPanelColumns,
                          .groups = block.groups,
                          .octets = octets,
                          .distance = distance};
      f(TileRange{row, rows, panel, count, distance},
        [&](const auto& sink) { any_tile(rows, count, args, sink); });
    }
  };
  // A single row reads as fast as memory is, panel by panel; more use each broadcast activation for
  // two. While rows are few the weight comes from memory, fastest in streams that go on from tile
  // to tile. Else panels outside, rows inside: some panels stay in the second cache while all rows
  // pass.
  const int64_t width = block.rows == 1 ? 1 : kPanels;
  const int64_t stream = block.rows <= 2 * kRows ? panels / width : 0;
  for (int64_t panel = 0; panel < stream; ++panel) rows_of(panel, width, stream);
  for (int64_t panel = stream * width; panel < panels; panel += width) {
    rows_of(panel, panels - panel < width ? panels - panel : width, 1);
  }
}

template <class T>
void multiply(const LinearInt4Block& block) {
#if defined(__AVX512VNNI__)
  if (block.rows > kRows && block.group_size >= kTallGroup) return multiply_tall<T>(block);
#endif
  constexpr int64_t kTileColumns = kPanels * kPanelColumns;
  alignas(64) float total[kRows * kTileColumns];
  for_each_tile(block, [&](const TileRange& range, const auto& run) {
    // Panels beside each other are one tile of the epilogue, others one each.
    const auto each_tile = [&](auto use) {
      const int64_t adjacent = range.distance == 1 ? range.panels : 1;
      for (int64_t p = 0; p < range.panels; p += adjacent) {
        const int64_t column = (range.panel + p * range.distance) * kPanelColumns;
        const int64_t rest = block.columns - column, columns = adjacent * kPanelColumns;
        use(block.epilogue, LinearTile<float>{.sum = total + p * kPanelColumns,
                                              .stride = kTileColumns,
                                              .row = range.row,
                                              .rows = range.rows,
                                              .column = column,
                                              .columns = rest < columns ? rest : columns});
      }
    };
    each_tile(fetch_residual<T, float>);
    run(Totals{.total = total, .stride = kTileColumns});
    each_tile([](const auto& to, const auto& tile) { finish<T, float>(to, tile); });
  });
}

void accumulate(const LinearInt4Block& block, int32_t* sums, int64_t stride) {
  for_each_tile(block, [&](const TileRange& range, const auto& run) {
    const int64_t column = range.panel * kPanelColumns;
    run(GroupSums{.sums = sums + range.row * block.groups * stride + column,
                  .stride = stride,
                  .columns = block.columns - column});
  });
}

// --- activations ---------------------------------------------------------------------------------

void prepare(const PrepareInt4Rows& rows) {
  // By value: bytes written through a pointer might be these.
  const int64_t in_features = rows.in_features, groups = rows.groups, size = rows.group_size;
  for (int64_t r = 0; r < rows.rows; ++r) {
    int8_t* row = rows.quantized + r * rows.quantized_stride;
    for (int64_t k = 0; k < in_features; ++k) row[k] ^= kFlip;
    memset(row + in_features, 0, (size_t)(groups * size - in_features));
    for (int64_t group = 0; group < groups; ++group) {
      int32_t sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += row[group * size + k];
      rows.group_sum[r * groups + group] = sum;
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
