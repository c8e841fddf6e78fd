// Tiles of an int8 product: integer sums of some rows and panels, exact on every instruction set.
#pragma once

#include "kernels/cpu/vec.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

// Each instruction set defines: how many rows a tile has at most, and how many panels beside so
// many rows; how a quantized byte is stored (xor kFlip); and tile<R, P>, which writes the sums of R
// rows times P panels to c, [R][P * 16].

struct TileArgs {
  const int8_t* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t panel_stride;
  int64_t quads;
  const int32_t* weight_sum;  // of the first panel
  int64_t weight_sum_stride;  // from panel to panel
  const int8_t* next;         // what comes after these panels, for the second cache to fetch,
  int64_t next_step;          // so many bytes with every quad
  int32_t* c;
};

#if defined(__AVX512VNNI__)

constexpr int kRows = 8;
constexpr int panels_of(int64_t rows) { return rows <= 6 ? 4 : 3; }
// vpdpbusd wants one side unsigned: activations are stored plus 128, and 128 times the column's sum
// is taken off again. Nothing saturates, and what wraps wraps back.
constexpr int8_t kFlip = -128;

template <int R, int P>
__attribute__((noinline)) void tile(const TileArgs& t) {
  // Few rows leave the multiplier waiting on its own result; more sums in flight hide that.
  constexpr int U = R == 1 ? 4 : R == 2 ? 2 : 1;
  __m512i acc[U][R][P];
  UNROLL for (int p = 0; p < P; ++p) {
    VecU32 offset;  // unsigned: 128 times a sum may wrap
    memcpy(&offset, t.weight_sum + p * t.weight_sum_stride, sizeof offset);
    offset *= -128u;
    UNROLL for (int u = 0; u < U; ++u) {
      UNROLL for (int r = 0; r < R; ++r) {
        acc[u][r][p] = u == 0 ? (__m512i)offset : _mm512_setzero_si512();
        // Hides from GCC 12 that this is known: it would spill the sums (35 % of peak, not 95 %).
        __asm__("" : "+v"(acc[u][r][p]));
      }
    }
  }
  const auto step = [&](int64_t k, __m512i(&sum)[R][P]) __attribute__((always_inline)) {
    __m512i b[P];
    UNROLL for (int p = 0; p < P; ++p) {
      const int8_t* from = t.b + p * t.panel_stride + k * 64;
      b[p] = _mm512_loadu_si512(from);
      // With fewer rows the loads are close enough for the processor to look ahead by itself.
      if (R > 4) {
        _mm_prefetch(t.next + p * t.panel_stride + k * t.next_step, _MM_HINT_T1);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(load_quad(t.a + r * t.a_stride + k * kQuad));
      UNROLL for (int p = 0; p < P; ++p) sum[r][p] = _mm512_dpbusd_epi32(sum[r][p], a, b[p]);
    }
  };
  int64_t k = 0;
  for (; k + U <= t.quads; k += U) {
    UNROLL for (int u = 0; u < U; ++u) step(k + u, acc[u]);
  }
  for (; k < t.quads; ++k) step(k, acc[0]);
  int32_t* c = t.c;
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int p = 0; p < P; ++p, c += kPanelColumns) {
      __m512i sum = acc[0][r][p];
      UNROLL for (int u = 1; u < U; ++u) sum = _mm512_add_epi32(sum, acc[u][r][p]);
      _mm512_storeu_si512(c, sum);
    }
  }
}

#elif defined(__AVX2__)

// Without VNNI: |x| * (y with the sign of x), summed in pairs to int16. Both sides lie within 127,
// and 2 * 127 * 127 = 32258 fits: exact, where unsigned times signed bytes would saturate.
constexpr int8_t kFlip = 0;

#if defined(__AVX512BW__)

constexpr int kRows = 8;
constexpr int panels_of(int64_t rows) { return rows <= 4 ? 4 : 2; }
constexpr int kHalves = 1;
typedef __m512i Bytes;
inline Bytes zero() { return _mm512_setzero_si512(); }
inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_sums(void* p, Bytes v) { _mm512_storeu_si512(p, v); }

struct Signed {
  Signed() = default;
  explicit Signed(Bytes x) : magnitude(_mm512_abs_epi8(x)), negative(_mm512_movepi8_mask(x)) {}
  Bytes add_dot(Bytes sum, Bytes y) const {
    y = _mm512_mask_sub_epi8(y, negative, _mm512_setzero_si512(), y);
    const __m512i pairs = _mm512_maddubs_epi16(magnitude, y);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
  Bytes magnitude;
  __mmask64 negative;
};
inline Bytes set_quads(int32_t quad) { return _mm512_set1_epi32(quad); }

#else

constexpr int kRows = 4;
constexpr int panels_of(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int kHalves = 2;
typedef __m256i Bytes;
inline Bytes zero() { return _mm256_setzero_si256(); }
inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_sums(void* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }

struct Signed {
  Signed() = default;
  explicit Signed(Bytes x) : x(x), magnitude(_mm256_abs_epi8(x)) {}
  Bytes add_dot(Bytes sum, Bytes y) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(y, x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  Bytes x, magnitude;
};
inline Bytes set_quads(int32_t quad) { return _mm256_set1_epi32(quad); }

#endif

template <int R, int P>
__attribute__((noinline)) void tile(const TileArgs& t) {
  constexpr int kVectors = P * kHalves;
  // The side of fewer registers is taken apart.
  constexpr bool kSplitA = R < kVectors;
  Bytes acc[R][kVectors];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = zero();
      __asm__("" : "+v"(acc[r][v]));
    }
  }
  for (int64_t k = 0; k < t.quads; ++k) {
    Bytes b[kVectors];
    Signed split_b[kVectors];
    UNROLL for (int v = 0; v < kVectors; ++v) {
      b[v] = load_bytes(t.b + v / kHalves * t.panel_stride + k * 64 + v % kHalves * sizeof(Bytes));
      if constexpr (!kSplitA) split_b[v] = Signed(b[v]);
    }
    UNROLL for (int r = 0; r < R; ++r) {
      const Bytes a = set_quads(load_quad(t.a + r * t.a_stride + k * kQuad));
      if constexpr (kSplitA) {
        const Signed split(a);
        UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = split.add_dot(acc[r][v], b[v]);
      } else {
        UNROLL for (int v = 0; v < kVectors; ++v) acc[r][v] = split_b[v].add_dot(acc[r][v], a);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      store_sums((char*)(t.c + r * P * kPanelColumns) + v * sizeof(Bytes), acc[r][v]);
    }
  }
}

#else

constexpr int kRows = 2;
constexpr int panels_of(int64_t) { return 1; }
constexpr int8_t kFlip = 0;

template <int R, int P>
void tile(const TileArgs& t) {
  for (int r = 0; r < R; ++r) {
    int32_t sum[P * kPanelColumns] = {};
    const int8_t* a = t.a + r * t.a_stride;
    for (int64_t k = 0; k < t.quads; ++k, a += kQuad) {
      const int8_t* b = t.b + k * kPanelColumns * kQuad;
      for (int n = 0; n < kPanelColumns; ++n, b += kQuad) {
        sum[n] += a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
      }
    }
    memcpy(t.c + r * kPanelColumns, sum, sizeof sum);
  }
}

#endif

// The tile compiled for exactly this many rows and panels, which are panels_of(rows) at most.
template <int R, int P>
inline void tile_of_rows(int64_t panels, const TileArgs& args) {
  if constexpr (P > 1) {
    if (panels < P) return tile_of_rows<R, P - 1>(panels, args);
  }
  tile<R, P>(args);
}
template <int R = kRows>
inline void any_tile(int64_t rows, int64_t panels, const TileArgs& args) {
  if constexpr (R > 1) {
    if (rows < R) return any_tile<R - 1>(rows, panels, args);
  }
  tile_of_rows<R, panels_of(R)>(panels, args);
}

// Sums of the weights of a panel: what takes kFlip off again.
inline void sum_weights(const int8_t* b, int64_t quads, int32_t* sums) {
#if defined(__AVX512VNNI__)
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < quads; ++k, b += 64) {
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(b));
  }
  _mm512_storeu_si512(sums, sum);
#else
  (void)b, (void)quads, (void)sums;
#endif
}

}  // namespace
}  // namespace torchweld::kernels::TORCHWELD_ISA
