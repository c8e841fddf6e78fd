#include "kernels/gemm_bf16.h"

#include "kernels/cpu/vec.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// A tile of c lives in kRows x kVectors of the 32 registers, beside a row of b and a pair of a in
// all lanes. Tiles are 7 or 14 rows high, which images of 7, 14, 28, 56 and 112 pixels are
// multiples of; 12 accumulators just hide the latency of two units.
template <int kVectors>
inline constexpr int kTileRows = kVectors >= 3 ? 7 : 14;

inline VecF multiply_add(VecF sums, VecF a, VecF b) {
  return (VecF)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}

// With the last factor in memory, which GCC 12 would load to a register it does not have.
inline VecF multiply_add(VecF sums, VecF a, const BFloat16* b) {
  typedef float Bits __attribute__((vector_size(64), may_alias, aligned(2)));
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "m"(*(const Bits*)b));
  return sums;
}

// Two values in all lanes, moved as the float whose bits they have. A pointer of this type, and no
// memcpy: the compiler sees a broadcast from memory only here.
typedef float PairBits __attribute__((may_alias, aligned(2)));
inline VecF broadcast_pair(const BFloat16* p) { return (VecF)_mm512_set1_ps(*(const PairBits*)p); }
// One value and zero: what lies beyond a run may be no number, and no memory of ours.
inline VecF broadcast_one(const BFloat16* p) { return (VecF)_mm512_set1_epi32(p->bits); }

__mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }

template <int kRows, int kVectors>
__attribute__((always_inline)) inline void finish(const GemmBF16Arguments& g, int64_t row,
                                                  VecF (&sums)[kRows][kVectors]) {
  const EpilogueOf<BFloat16>& e = g.epilogue;
  const int64_t left = g.columns - (kVectors - 1) * kLanesF;
  const __mmask16 last = left < kLanesF ? first_lanes(left) : (__mmask16)-1;
  const __m512 low = _mm512_set1_ps(e.low), high = _mm512_set1_ps(e.high);
  VecF bias[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __mmask16 mask = v + 1 < kVectors ? (__mmask16)-1 : last;
    bias[v] = VecF{};
    if (e.bias != nullptr) {
      bias[v] = (VecF)_mm512_maskz_loadu_ps(mask, e.bias + v * kLanesF);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    const int64_t offset = (row + i) * g.c_row;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = v + 1 < kVectors ? (__mmask16)-1 : last;
      VecF value = sums[i][v] + bias[v];
      if (e.residual != nullptr) {
        const BFloat16* residual = e.residual + offset + v * kLanesF;
        value += to_float((VecU16)_mm256_maskz_loadu_epi16(mask, residual), BFloat16{});
      }
      // The operand that a NaN passes through is the second.
      const __m512 clamped = _mm512_min_ps(high, _mm512_max_ps(low, (__m512)value));
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(clamped);
      BFloat16* to = g.c + offset + v * kLanesF;
      if (v + 1 == kVectors && left < kLanesF) {
        _mm256_mask_storeu_epi16(to, mask, rounded);
      } else {
        memcpy(to, &rounded, sizeof rounded);
      }
    }
  }
}

template <int kRows, int kVectors>
__attribute__((noinline)) void tile(const GemmBF16Arguments& g, int64_t row) {
  const int64_t a_row = g.a_row, b_row = 2 * g.width;
  VecF sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = VecF{};
  }

  // By the time the sums are done, their place is in the nearest cache.
  for (int i = 0; i < kRows; ++i) {
    const char* to = (const char*)(g.c + (row + i) * g.c_row);
    __builtin_prefetch(to, 1);
    if (kVectors > 2) __builtin_prefetch(to + 64, 1);
  }
  // A residual comes from memory, or nearly: the next tile's has the time of this one to come.
  for (int i = 0; g.epilogue.residual != nullptr && i < kRows; ++i) {
    const char* next = (const char*)(g.epilogue.residual + (row + kRows + i) * g.c_row);
    __builtin_prefetch(next);
    if (kVectors > 2) __builtin_prefetch(next + 64);
  }

  // The rows of the next tile: read for the first time, they are too far apart for the hardware.
  if (g.runs == 1) {
    const BFloat16* next = g.a[0] + (row + kRows) * a_row;
    for (int64_t k = 0; k < kRows * a_row; k += 32) __builtin_prefetch(next + k, 0, 2);
  }

  // 28 + 4 + 1 registers would be one too many: then each row reads the last column from memory.
  constexpr bool kFull = kRows == 7 && kVectors == 4;
  // One pointer for every three rows: x86 addresses reach base, base + row and base + 2 * row.
  constexpr int kPointers = (kRows + 2) / 3;
  const BFloat16* a[kPointers];
  const BFloat16* b = g.b;
  const auto step = [&](auto pair_at) __attribute__((always_inline)) {
    VecF columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors - kFull; ++v) columns[v] = load((const float*)b + v * kLanesF);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const VecF pair = pair_at(a[i / 3] + (i % 3) * a_row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (kFull && v == 3) {
          sums[i][3] = multiply_add(sums[i][3], pair, b + 2 * 3 * kLanesF);
        } else {
          sums[i][v] = multiply_add(sums[i][v], pair, columns[v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) a[p] += 2;
    b += b_row;
  };
  for (int64_t run = 0; run < g.runs; ++run) {
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) {
      a[p] = g.a[run] + (row + 3 * p) * a_row;
      asm volatile("" : "+r"(a[p]));  // else the compiler derives them all from one in the loop
    }
    for (int64_t k = g.depth / 2; k > 0; --k) step(broadcast_pair);
    if (g.depth % 2 != 0) step(broadcast_one);
  }
  finish(g, row, sums);
}

// Tiles of kRows rows from `row` on.
template <int kRows, int kVectors>
int64_t tiles(const GemmBF16Arguments& g, int64_t row) {
  for (; row + kRows <= g.rows; row += kRows) {
    // 8, 10 and 12 rows go in fours and twos: a single row's sums would wait for each other.
    const int64_t left = g.rows - row;
    if (kRows == 7 && left < 14 && left % 2 == 0) break;
    tile<kRows, kVectors>(g, row);
  }
  return row;
}

template <int kVectors>
void columns(const GemmBF16Arguments& g) {
  constexpr int kRows = kTileRows<kVectors>;
  int64_t row = tiles<kRows, kVectors>(g, 0);
  if constexpr (kRows == 14) row = tiles<7, kVectors>(g, row);
  row = tiles<4, kVectors>(g, row);
  row = tiles<3, kVectors>(g, row);
  row = tiles<2, kVectors>(g, row);
  tiles<1, kVectors>(g, row);
}

void gemm(const GemmBF16Arguments& g) {
  static_assert(kPanel == 4 * kLanesF);
  switch ((g.columns + kLanesF - 1) / kLanesF) {
    case 4:
      return columns<4>(g);
    case 3:
      return columns<3>(g);
    case 2:
      return columns<2>(g);
    default:
      return columns<1>(g);
  }
}

}  // namespace

extern const GemmBF16Kernels gemm_bf16;
const GemmBF16Kernels gemm_bf16{.gemm = gemm};

}  // namespace torchweld::kernels::TORCHWELD_ISA
