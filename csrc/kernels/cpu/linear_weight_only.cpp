// The linear layer with float activations: bytes of the weight become floats in registers, and are
// used for eight rows or as many as there are. On AVX-512 the conversion runs beside the
// multiplications, on units of its own: tiles of floats in memory, made once for all rows, were
// slower at every number of rows. Few rows take four registers of columns at a time: each sum is
// one chain of fused multiply-adds, and fewer chains would leave the multipliers waiting.
#include "kernels/linear_weight_only.h"

#include "kernels/cpu/linear_epilogue.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kHalves = kPanelColumns / kLanesF;  // registers that hold a panel's columns
constexpr int kTileColumns = 4 * kPanelColumns;
constexpr int64_t kRows = kInterleavedRows;

// Bytes of a panel to ask for ahead of their use: the hardware stops at the end of a page.
constexpr int64_t kAhead = 4096;

struct TileArgs {
  const float* a;  // [in_features][rows]
  const int8_t* b;
  int64_t panel_stride;
  int64_t in_features;
  float* sums;  // [rows][kTileColumns]
};

// R rows times V registers of columns, from register `first` of the panel at t.b on.
template <int R, int V>
__attribute__((noinline)) void tile(const TileArgs& t, int64_t first) {
  VecF sum[R][V];
  UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int v = 0; v < V; ++v) sum[r][v] = VecF{}; }
  const float* a = t.a;
  const int8_t* b[V];
  UNROLL for (int v = 0; v < V; ++v) {
    b[v] = t.b + (first + v) / kHalves * t.panel_stride + (first + v) % kHalves * kVectorBytes;
  }
  int64_t at = 0;
  const auto quad = [&](int64_t count) __attribute__((always_inline)) {
    VecI32 bytes[V];
    UNROLL for (int v = 0; v < V; ++v) {
      memcpy(&bytes[v], b[v] + at, sizeof bytes[v]);
      __builtin_prefetch(b[v] + at + kAhead);
    }
    UNROLL for (int i = 0; i < kQuad; ++i) {
      if (i >= count) break;
      UNROLL for (int v = 0; v < V; ++v) {
        const VecF weight = __builtin_convertvector(bytes[v] << (24 - 8 * i) >> 24, VecF);
        UNROLL for (int r = 0; r < R; ++r) {
          sum[r][v] = fma(broadcast<VecF>(a[i * R + r]), weight, sum[r][v]);
        }
      }
    }
    a += kQuad * R;
    at += kPanelColumns * kQuad;
  };
  int64_t k = t.in_features;
  for (; k >= kQuad; k -= kQuad) quad(kQuad);
  if (k > 0) quad(k);
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) {
      store(t.sums + r * kTileColumns + (first + v) * kLanesF, sum[r][v]);
    }
  }
}

// Registers of columns at a time: as many as leave room for the sums of R rows.
template <int R>
inline constexpr int kVectorsOf = kVectorBytes == 64 ? (R <= 4 ? 4 : 2)
                                  : R <= 2           ? 4
                                  : R <= 6           ? 2
                                                     : 1;

template <int R>
void rows_of(int64_t rows, int64_t panels, const TileArgs& args) {
  if constexpr (R > 1) {
    if (rows < R) return rows_of<R - 1>(rows, panels, args);
  }
  constexpr int V = kVectorsOf<R>;
  int64_t first = 0;
  for (; first + V <= panels * kHalves; first += V) tile<R, V>(args, first);
  for (; first < panels * kHalves; ++first) tile<R, 1>(args, first);
}

template <class T>
void interleave(const InterleaveRows& rows) {
  float* to = rows.output;
  for (int64_t row = 0; row < rows.rows; row += kInterleavedRows) {
    const int64_t count = rows.rows - row < kInterleavedRows ? rows.rows - row : kInterleavedRows;
    for (int64_t r = 0; r < count; ++r) {
      const T* from = static_cast<const T*>(rows.input) + (row + r) * rows.input_stride;
      for (int64_t k = 0; k < rows.in_features; k += kLanesF) {
        const int64_t left = rows.in_features - k;
        float values[kLanesF];
        store(values, left >= kLanesF ? load(from + k) : load_partial(from + k, left));
        for (int64_t i = 0; i < (left < kLanesF ? left : kLanesF); ++i) {
          to[(k + i) * count + r] = values[i];
        }
      }
    }
    to += count * rows.in_features;
  }
}

template <class T>
void multiply(const WeightOnlyBlock& block) {
  const int64_t panel_stride = (block.in_features + kQuad - 1) / kQuad * kPanelColumns * kQuad;
  alignas(64) float sums[kRows * kTileColumns];
  for (int64_t n = 0; n < block.columns; n += kTileColumns) {
    const int64_t rest = block.columns - n;
    const int64_t columns = rest < kTileColumns ? rest : kTileColumns;
    for (int64_t row = 0; row < block.rows; row += kRows) {
      const int64_t rows = block.rows - row < kRows ? block.rows - row : kRows;
      rows_of<kRows>(rows, (columns + kPanelColumns - 1) / kPanelColumns,
                     {.a = block.input + row * block.in_features,
                      .b = block.panels + n / kPanelColumns * panel_stride,
                      .panel_stride = panel_stride,
                      .in_features = block.in_features,
                      .sums = sums});
      finish<T, float>(block.epilogue, {.sum = sums,
                                        .stride = kTileColumns,
                                        .row = row,
                                        .rows = rows,
                                        .column = n,
                                        .columns = columns});
    }
  }
}

}  // namespace

extern const WeightOnlyKernels linear_weight_only;
const WeightOnlyKernels linear_weight_only{
    .interleave = {interleave<float>, nullptr, interleave<BFloat16>, interleave<Float16>},
    .multiply = {multiply<float>, nullptr, multiply<BFloat16>, multiply<Float16>},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
