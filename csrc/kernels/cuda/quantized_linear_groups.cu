// Up to kFewRows rows whose groups of K have scales of their own, each whole steps. The warps of a
// block of 32 columns take groups in turn, loading two steps ahead of what they multiply; a thread
// for four columns of a row joins the groups' sums in their order, so the bits are the CPU's.
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/quantized_linear_few.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 2;      // steps
constexpr int kRowWords = 36;  // of 32 columns; no conflicts

template <int kTiles>
__global__ void __launch_bounds__(kThreads, 2) multiply_groups(QuantizedLinearParams params) {
  constexpr int kRows = 8 * kTiles;
  static_assert(kRows * 8 <= kThreads);
  __shared__ int32_t slots[kWarps][kRows][kRowWords];
  const int64_t warp = threadIdx.x / 32, of_group = params.group_quads / kStepQuads;
  const int64_t groups = tiles_of(params.quads, params.group_quads);
  const int64_t rounds = tiles_of(groups, kWarps), steps = tiles_of(params.quads, kStepQuads);
  FewLane<kTiles> lane(params, blockIdx.x);
  // The warp's next step to be loaded, and to be multiplied: which of its group, and of K.
  int64_t ahead_in_group = 0, ahead = warp * of_group, in_group = 0, step = ahead;
  const auto advance = [&](int64_t& in, int64_t& of) {
    ++of;
    if (++in == of_group) in = 0, of += (kWarps - 1) * of_group;
  };
  Word words[kAhead][4];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    lane.load(ahead, ahead < steps, words[i]);
    advance(ahead_in_group, ahead);
  }

  const int row = static_cast<int>(threadIdx.x) / 8, quarter = static_cast<int>(threadIdx.x) % 8;
  const bool joins = row < kRows && row < params.rows;
  float total[4] = {};
  int64_t round = 0;
  while (round < rounds) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step < steps) lane.multiply(params.quantized, params.quantized_stride, step, words[i]);
      lane.load(ahead, ahead < steps, words[i]);
      advance(ahead_in_group, ahead);
      advance(in_group, step);
      if (in_group != 0 || round == rounds) continue;
      __syncthreads();  // what the last round left has been read
      lane.take_sums(
          [&](int of_row, int column, int32_t sum) { slots[warp][of_row][column] = sum; });
      __syncthreads();
      for (int64_t w = 0; joins && w < kWarps; ++w) {
        const int64_t group = round * kWarps + w;
        if (group >= groups) break;
        const float scale = params.group_scale[row * groups + group];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[j] = fma(static_cast<float>(slots[w][row][4 * quarter + j]), scale, total[j]);
        }
      }
      ++round;
    }
  }
  const FourColumns columns(params.end, blockIdx.x * kFewColumns + 4 * quarter, params.columns);
  if (joins && columns.count > 0) columns.finish(params.end, row, total);
}

}  // namespace

cudaError_t launch_few_groups(const QuantizedLinearParams& params, cudaStream_t stream) {
  const auto kernel = params.rows <= 8    ? multiply_groups<1>
                      : params.rows <= 16 ? multiply_groups<2>
                                          : multiply_groups<4>;
  return launch(kernel, params.rows == 0 ? 0 : tiles_of(params.columns, kFewColumns), kThreads,
                stream, params);
}

}  // namespace torchweld::kernels::cuda
