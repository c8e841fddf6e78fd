#include "kernels/gemm.h"

#include "kernels/cpu/loop.h"
#include "kernels/cpu/transpose.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

// A tile of c lives in registers: kRows x kVectors of them, which leaves room for a row of b and
// one broadcast of a. With 32 registers tiles are 7 or 14 rows high, which images of 7, 14, 28, 56
// and 112 pixels are multiples of. 12 accumulators just hide the latency of two FMA units.
#if defined(__AVX512F__)
inline constexpr int kMaxVectors = 4;
template <int kVectors, bool kPart>
inline constexpr int kTileRows = kVectors == 4   ? (kPart ? 6 : 7)
                                 : kVectors == 3 ? 7
                                                 : 14;
#else
inline constexpr int kMaxVectors = 2;
template <int kVectors, bool kPart>
inline constexpr int kTileRows = kVectors == 2 ? 6 : 12;
#endif

// The longest row whose successor is fetched into the nearest cache.
inline constexpr int64_t kNearDepth = 128;

template <int kLocality>
struct Locality {
  static constexpr int value = kLocality;
};

// Where `steps` lines to be fetched ahead begin; `other` if there are none left. The last of them
// may lie past the end.
inline const float* take(Ahead& ahead, int64_t steps, const float* other) {
  if (ahead.count == 0) return other;
  Ahead::Stretch& stretch = ahead.stretches[ahead.count - 1];
  const float* data = stretch.data;
  stretch.data += steps * 16;
  stretch.size -= steps * 16;
  if (stretch.size <= 0) --ahead.count;
  return data;
}

// Vector v of a row of which only the last vector may be a part.
template <int kVectors, bool kPart, class T>
__attribute__((always_inline)) inline VecF load_column(const T* p, int v, Part last) {
  if (kPart && v + 1 == kVectors) return load(p + v * kLanesF, last);
  return load(p + v * kLanesF);
}

template <int kRows, int kVectors, bool kPart>
__attribute__((noinline)) void tile(const GemmArguments& g, int64_t row, int64_t column) {
  const Part last{g.columns - column - (kVectors - 1) * kLanesF};
  const int64_t a_row = g.a_row, a_step = g.a_step, b_row = g.b_row;
  float* c = g.c + row * g.c_row + column;
  VecF sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = VecF{};
    }
  }

  // By the time the sums are done, their place is in the nearest cache, and what joins them there.
  const float* residual =
      g.epilogue.residual ? g.epilogue.residual + row * g.c_row + column : nullptr;
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors * kVectorBytes; v += 64) {
      __builtin_prefetch((const char*)(c + i * g.c_row) + v, 1);
      if (residual) __builtin_prefetch((const char*)(residual + i * g.c_row) + v, 0);
    }
  }

  // The rows of the next tile: read for the first time, they are too far apart for the hardware.
  // Long ones that lie together are fetched a step at a time: all at once they would be waited for.
  const bool walks = a_step == 1 && g.runs == 1 && a_row == g.depth && g.depth > kNearDepth;
  const float* rows_ahead = g.a[0] + (walks ? (row + kRows) * a_row : 0);
  const int64_t rows_step = walks ? kRows : 0;
  if (a_step == 1 && g.runs == 1 && !walks) {
    const float* next = g.a[0] + (row + kRows) * a_row;
    const auto prefetch_rows = [&](auto locality) {
      for (int i = 0; i < kRows; ++i) {
        for (int64_t k = 0; k < g.depth; k += 16) {
          __builtin_prefetch(next + i * a_row + k, 0, decltype(locality)::value);
        }
      }
    };
    // Long rows would push out of the nearest cache those that are in use.
    if (g.depth <= kNearDepth) {
      prefetch_rows(Locality<3>{});
    } else {
      prefetch_rows(Locality<2>{});
    }
  }

  // One pointer for every three rows: x86 addresses reach base, base + row and base + 2 * row.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* a[kPointers];
  const auto start = [&](int64_t run) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) {
      a[p] = g.by_threes ? g.a[(row / 3 + p) * g.runs + run] : g.a[run] + (row + 3 * p) * a_row;
      asm volatile("" : "+r"(a[p]));  // else the compiler derives them all from one in the loop
    }
  };
  const float* b = g.b + column;
  const float* ahead = g.ahead ? take(*g.ahead, g.runs * g.depth, b) : b;
  const auto step = [&](bool fetches) __attribute__((always_inline)) {
    VecF columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load_column<kVectors, kPart>(b, v, last);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const VecF value = broadcast<VecF>(a[i / 3][(i % 3) * a_row]);
      if constexpr (kRows == 7 && kVectors == 4) {
        // 28 + 4 + 1 registers are one too many: each row reads the last column from memory.
        asm volatile("" ::: "memory");
        columns[3] = load(b + 3 * kLanesF);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(value, columns[v], sums[i][v]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPointers; ++p) a[p] += a_step;
    b += b_row;
    if (fetches) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += 16;
      __builtin_prefetch(rows_ahead, 0, 2);
      rows_ahead += rows_step;
    }
  };
  if (g.runs == 1) {
    start(0);
    for (int64_t k = 0; k < g.depth; ++k) step(true);
  } else if (g.depth > 0) {
    // One loop over all steps, for runs may be as short as one. To fetch costs a load, which counts
    // where a row of b is one register.
    const bool fetches = kVectors > 1 || ahead != b;
    const int64_t steps = g.runs * g.depth;
    for (int64_t k = 0, left = 0, run = 0; k < steps; ++k, --left) {
      if (left == 0) {
        start(run++);
        left = g.depth;
      }
      step(fetches);
    }
  }

  // Step by step over all registers: a decision for each would take as long as the sums of a short
  // chain.
  const Epilogue& e = g.epilogue;
  const auto for_each_sum = [&](const auto& f) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) f(sums[i][v], i * g.c_row, v);
    }
  };
  if (g.accumulate) {
    for_each_sum([&](VecF& sum, int64_t at, int v) __attribute__((always_inline)) {
      sum += load_column<kVectors, kPart>(c + at, v, last);
    });
  }
  if (e.bias != nullptr) {
    for_each_sum([&](VecF& sum, int64_t, int v) __attribute__((always_inline)) {
      sum += load_column<kVectors, kPart>(e.bias + column, v, last);
    });
  }
  if (residual != nullptr) {
    for_each_sum([&](VecF& sum, int64_t at, int v) __attribute__((always_inline)) {
      sum += load_column<kVectors, kPart>(residual + at, v, last);
    });
  }
  if (e.low > -__builtin_inff() || e.high < __builtin_inff()) {
    const VecF low = broadcast<VecF>(e.low), high = broadcast<VecF>(e.high);
    for_each_sum([&](VecF& sum, int64_t, int) __attribute__((always_inline)) {
      sum = sum < low ? low : sum;
      sum = sum > high ? high : sum;
    });
  }
  for_each_sum([&](VecF sum, int64_t at, int v) __attribute__((always_inline)) {
    if (kPart && v + 1 == kVectors) {
      store(c + at + v * kLanesF, sum, last);
    } else {
      store(c + at + v * kLanesF, sum);
    }
  });
}

// Tiles of kRows rows from `row` on.
template <int kRows, int kVectors, bool kPart>
int64_t tiles(const GemmArguments& g, int64_t row, int64_t column) {
  for (; row + kRows <= g.rows; row += kRows) {
    // 8, 10 and 12 rows go in fours and twos: a single row's sums would wait for each other.
    const int64_t left = g.rows - row;
    if (kRows == 7 && left < 14 && left % 2 == 0) break;
    tile<kRows, kVectors, kPart>(g, row, column);
  }
  return row;
}

template <int kVectors, bool kPart>
void columns(const GemmArguments& g, int64_t column) {
  constexpr int kRows = kTileRows<kVectors, kPart>;
  if (g.by_threes) {
    int64_t row = 0;
    if constexpr (kRows > 9) row = tiles<9, kVectors, kPart>(g, row, column);
    tiles<3, kVectors, kPart>(g, row, column);
    return;
  }
  int64_t row = tiles<kRows, kVectors, kPart>(g, 0, column);
  if constexpr (kRows == 14) row = tiles<7, kVectors, kPart>(g, row, column);
  row = tiles<4, kVectors, kPart>(g, row, column);
  row = tiles<3, kVectors, kPart>(g, row, column);
  row = tiles<2, kVectors, kPart>(g, row, column);
  tiles<1, kVectors, kPart>(g, row, column);
}

template <int kVectors>
void columns(const GemmArguments& g, int64_t column, bool part) {
  if (part) {
    columns<kVectors, true>(g, column);
  } else {
    columns<kVectors, false>(g, column);
  }
}

void gemm(const GemmArguments& g) {
  for (int64_t column = 0; column < g.columns; column += kMaxVectors * kLanesF) {
    const int64_t left = g.columns - column;
    const int64_t vectors = (left + kLanesF - 1) / kLanesF;
    const bool part = vectors <= kMaxVectors && left % kLanesF != 0;
#if defined(__AVX512F__)
    if (vectors >= 4) {
      columns<4>(g, column, part);
      continue;
    }
    if (vectors == 3) {
      columns<3>(g, column, part);
      continue;
    }
#endif
    if (vectors >= 2) {
      columns<2>(g, column, part);
    } else {
      columns<1>(g, column, part);
    }
  }
}

void pack(const float* weight, int64_t row, int64_t columns, int64_t depth, float* packed,
          int64_t width) {
  for (int64_t first = 0; first < width; first += kLanesF) {
    const float* from = weight + first * row;
    float* to = packed + first;
    int64_t k = 0;
    for (; first + kLanesF <= columns && k + kLanesF <= depth; k += kLanesF) {
      transpose(from + k, row, to + k * width, width);
    }
    for (; k < depth; ++k) {
      for (int64_t j = 0; j < kLanesF; ++j) {
        to[k * width + j] = first + j < columns ? from[j * row + k] : 0.0f;
      }
    }
  }
}

// kRegisters of floats from `parts` on. The same of the next ones is fetched meanwhile: a part is
// too short for the hardware to see where it leads.
template <int kRegisters, class P>
void add_up_registers(const float* parts, int64_t count, int64_t stride, float* sums, P part) {
  VecD totals[kRegisters][2] = {};
  for (int64_t p = 0; p < count; ++p, parts += stride) {
#pragma GCC unroll 8
    for (int v = 0; v < kRegisters; ++v) {
      __builtin_prefetch(parts + (kRegisters + v) * kLanesF);
      VecD halves[2];
      widen(load(parts + v * kLanesF, part), halves);
      totals[v][0] += halves[0];
      totals[v][1] += halves[1];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kRegisters; ++v) store(sums + v * kLanesF, narrow(totals[v]), part);
}

void add_up(const float* parts, int64_t count, int64_t stride, int64_t size, float* sums) {
  int64_t i = 0;
  for (; i + 4 * kLanesF <= size; i += 4 * kLanesF) {
    add_up_registers<4>(parts + i, count, stride, sums + i, Whole{});
  }
  for (; i + kLanesF <= size; i += kLanesF) {
    add_up_registers<1>(parts + i, count, stride, sums + i, Whole{});
  }
  if (i < size) add_up_registers<1>(parts + i, count, stride, sums + i, Part{size - i});
}

void add_rows(const float* const* from, int64_t count, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += kPanelGroup) {
#pragma GCC unroll 4
    for (int64_t k = i; k < i + kPanelGroup; k += kLanesF) {
      VecF sum = load(from[0] + k);
      for (int64_t r = 1; r < count; ++r) sum += load(from[r] + k);
      store(to + k, load(to + k) + sum);
    }
  }
}

}  // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels{.gemm = gemm, .pack = pack, .add_up = add_up, .add_rows = add_rows};

}  // namespace torchweld::kernels::TORCHWELD_ISA
