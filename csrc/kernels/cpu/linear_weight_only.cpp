// The linear layer with float activations: bytes of the weight become floats in registers, and are
// used for as many rows as there are. Four panels at a time for few rows: each sum is one chain of
// fused multiply-adds, and fewer chains would leave the multipliers waiting on their own results.
#include "kernels/linear_weight_only.h"

#include "kernels/cpu/linear_epilogue.h"
#include "kernels/gemm.h"

namespace torchweld::kernels::TORCHWELD_ISA {
namespace {

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kHalves = kPanelColumns / kLanesF;  // registers that hold a panel's columns
constexpr int kPanels = 4;
constexpr int kTileColumns = kPanels * kPanelColumns;
constexpr int kRows = 8;

struct TileArgs {
  const float* a;
  int64_t a_stride;
  const int8_t* b;
  int64_t panel_stride;
  int64_t in_features;
  float* sums;  // [rows][kTileColumns]
};

template <int R, int P>
__attribute__((noinline)) void tile(const TileArgs& t) {
  constexpr int V = P * kHalves;
  VecF sum[R][V];
  UNROLL for (int r = 0; r < R; ++r) { UNROLL for (int v = 0; v < V; ++v) sum[r][v] = VecF{}; }
  const float* a = t.a;
  const int8_t* b = t.b;
  const auto quad = [&](int64_t count) __attribute__((always_inline)) {
    VecI32 bytes[V];
    UNROLL for (int v = 0; v < V; ++v) {
      memcpy(&bytes[v], b + v / kHalves * t.panel_stride + v % kHalves * kVectorBytes,
             sizeof bytes[v]);
    }
    UNROLL for (int i = 0; i < kQuad; ++i) {
      if (i >= count) break;
      UNROLL for (int v = 0; v < V; ++v) {
        const VecF weight = __builtin_convertvector(bytes[v] << (24 - 8 * i) >> 24, VecF);
        UNROLL for (int r = 0; r < R; ++r) {
          sum[r][v] = fma(broadcast<VecF>(a[r * t.a_stride + i]), weight, sum[r][v]);
        }
      }
    }
    a += kQuad;
    b += kPanelColumns * kQuad;
  };
  int64_t k = t.in_features;
  for (; k >= kQuad; k -= kQuad) quad(kQuad);
  if (k > 0) quad(k);
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int v = 0; v < V; ++v) {
      store(t.sums + r * kTileColumns + v * kLanesF, sum[r][v]);
    }
  }
}

// Panels at a time: as many as leave room for the sums of R rows.
template <int R>
inline constexpr int kPanelsOf = kVectorBytes == 64 ? (R <= 4 ? 4 : 2)
                                 : R <= 2           ? 2
                                                    : 1;

template <int R>
void rows_of(int64_t rows, int64_t panels, TileArgs args) {
  if constexpr (R > 1) {
    if (rows < R) return rows_of<R - 1>(rows, panels, args);
  }
  constexpr int P = kPanelsOf<R>;
  const auto advance = [&](int count) {
    panels -= count;
    args.b += count * args.panel_stride;
    args.sums += count * kPanelColumns;
  };
  for (; panels >= P; advance(P)) tile<R, P>(args);
  for (; panels > 0; advance(1)) tile<R, 1>(args);
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
                     {.a = block.input + row * block.input_stride,
                      .a_stride = block.input_stride,
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

template <class T>
void finish_sums(const WeightOnlySums& block) {
  finish<T, float>(block.epilogue, {.sum = block.sums,
                                    .stride = kPanel,
                                    .row = 0,
                                    .rows = block.rows,
                                    .column = 0,
                                    .columns = block.columns});
}

}  // namespace

extern const WeightOnlyKernels linear_weight_only;
const WeightOnlyKernels linear_weight_only{
    .multiply = {multiply<float>, nullptr, multiply<BFloat16>, multiply<Float16>},
    .finish = {finish_sums<float>, nullptr, finish_sums<BFloat16>, finish_sums<Float16>},
};

}  // namespace torchweld::kernels::TORCHWELD_ISA
