// Many rows: tiles of columns and rows, both sides copied to shared memory some steps ahead, summed
// by four warps in registers, finished without leaving the block. Three ways to end a sum:
//
//   int32_t  all of K is one exact sum
//   float    groups of K, each times its own scale, in their order
//   int64_t  K too long for int32: blocks of it, joined exactly
#include "kernels/cuda/async.h"
#include "kernels/cuda/linear_epilogue.h"
#include "kernels/cuda/mma.h"
#include "kernels/cuda/quantized_linear_parts.h"

namespace torchweld::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kStages = 4;
constexpr int kStepBytes = static_cast<int>(kStep);
constexpr int kPanelBytes = static_cast<int>(kPanelColumns) * kStepBytes;  // of a step
constexpr int64_t kLongGroupQuads = (1 << 16) / kQuad;

// Two by two warps, each with 32 kPairs columns and 8 kTiles rows.
template <int kPairs, int kTiles>
struct Size {
  static constexpr int kColumns = 64 * kPairs;
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kStageBytes = (kColumns + kRows) * kStepBytes;
  static constexpr int kWarpBytes = 32 * kPairs * 8 * kTiles * 4;  // of sums
  static_assert(4 * kWarpBytes <= kStages * kStageBytes);
};

// Pieces of 16 bytes of a panel are kept where the 8 lanes that read at once find 8 banks.
TORCHWELD_INLINE int place_of(int piece) { return piece ^ ((piece >> 4 & 3) << 1); }

// The first row and column of the tile of a block.
struct Place {
  template <class S>
  TORCHWELD_INLINE Place(const QuantizedLinearParams& params, int64_t block, S)
      : tile(block, tiles_of(params.rows, S::kRows), tiles_of(params.columns, S::kColumns)),
        row(tile.row * S::kRows),
        column(tile.column * S::kColumns) {}
  TilePlace tile;
  int64_t row, column;
};

template <class S>
TORCHWELD_INLINE void copy_step(const QuantizedLinearParams& params, const Place& at, int64_t step,
                                unsigned char* stage) {
  const int64_t panels = (params.columns + kPanelColumns - 1) / kPanelColumns;
#pragma unroll
  for (int i = 0; i < S::kColumns * 4 / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int64_t panel = at.column / kPanelColumns + piece / 64;
    const int64_t quad = step * kStepQuads + piece % 64 / 4;
    const int8_t* from =
        params.panels + ((panel * params.quads + quad) * kPanelColumns + piece % 4 * 4) * kQuad;
    copy_async(stage + piece / 64 * kPanelBytes + place_of(piece % 64) * 16, from,
               panel < panels && quad < params.quads);
  }
  stage += S::kColumns * kStepBytes;
#pragma unroll
  for (int i = 0; i < S::kRows * 4 / kThreads; ++i) {
    const int piece = i * kThreads + static_cast<int>(threadIdx.x);
    const int64_t row = at.row + piece / 4;
    const int8_t* from =
        params.quantized + row * params.quantized_stride + step * kStep + piece % 4 * 16;
    copy_async(stage + piece * 16, from, row < params.rows);
  }
}

// What the epilogue is given for a total.
template <class Total>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<int32_t> {
  using Type = int32_t;
};

// What a warp has of its tile.
template <class Total, int kPairs, int kTiles>
class Warp {
 public:
  using Sum = typename SumOf<Total>::Type;

  TORCHWELD_INLINE Warp()
      : g_(threadIdx.x % 32 / 4),
        t_(threadIdx.x % 4),
        column_(threadIdx.x / 32 % 2 * 32 * kPairs),
        row_(threadIdx.x / 64 * 8 * kTiles) {}

  // Adds the products of a step's quads [begin, end).
  template <bool kAll>
  TORCHWELD_INLINE void multiply(const unsigned char* stage, int begin, int end) {
    const unsigned char* left = stage + (column_ / 16 + g_ / 4) * kPanelBytes;
    const unsigned char* right =
        stage + Size<kPairs, kTiles>::kColumns * kStepBytes + (row_ + g_) * kStepBytes + t_ * 16;
    Word x[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      x[tile] = *reinterpret_cast<const Word*>(right + tile * 8 * kStepBytes);
      if constexpr (!kAll) {
        const int quad = 4 * t_;
        const auto keep = [&](int i, uint32_t word) {
          return quad + i >= begin && quad + i < end ? word : 0u;
        };
        x[tile] = {keep(0, x[tile].x), keep(1, x[tile].y), keep(2, x[tile].z), keep(3, x[tile].w)};
      }
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto word = [&](int quad) {
          const int piece = (4 * t_ + quad) * 4 + g_ % 4;
          return *reinterpret_cast<const Word*>(left + pair * 2 * kPanelBytes +
                                                place_of(piece) * 16);
        };
        const Word low = word(2 * half), high = word(2 * half + 1);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint32_t b[2] = {half ? x[tile].z : x[tile].x, half ? x[tile].w : x[tile].y};
          mma_s8(sum_[pair][tile][0], {low.x, low.y, high.x, high.y}, b);
          mma_s8(sum_[pair][tile][1], {low.z, low.w, high.z, high.w}, b);
        }
      }
    }
  }

  // Ends a group: what is summed so far goes to the total.
  TORCHWELD_INLINE void end_group(const QuantizedLinearParams& params, const Place& at,
                                  int64_t group, int64_t groups) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float scale[2] = {};
      if constexpr (__is_same(Total, float)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = at.row + row_ + tile * 8 + 2 * t_ + i;
          if (row < params.rows) scale[i] = params.group_scale[row * groups + group];
        }
      }
#pragma unroll
      for (int i = 0; i < 8 * kPairs; ++i) {
        int32_t& sum = sum_[i / 8][tile][i / 4 % 2][i % 4];
        Total& total = total_[i / 8][tile][i / 4 % 2][i % 4];
        if constexpr (__is_same(Total, float)) {
          total = fma(static_cast<float>(sum), scale[i % 2], total);
        } else {
          total += sum;
        }
        sum = 0;
      }
    }
  }

  // Lays the sums out by rows in memory that is the warp's own, and finishes them there.
  TORCHWELD_INLINE void finish(const QuantizedLinearParams& params, const LinearEnd& end,
                               const Place& at, unsigned char* memory) const {
    constexpr int kPieces = 8 * kPairs;  // four columns each, of a row
    auto* const words =
        reinterpret_cast<Sum*>(memory + threadIdx.x / 32 * Size<kPairs, kTiles>::kWarpBytes);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2 * kPairs; ++i) {
        const int pair = i / 2, row = tile * 8 + 2 * t_ + i % 2;
        const int piece = (pair * 8 + g_) ^ (t_ << 1);
        Sum four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = sum_at(pair, tile, j / 2, j % 2 * 2 + i % 2);
        memcpy(words + (row * kPieces + piece) * 4, four, sizeof four);
      }
    }
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x % 32);
    const FourColumns columns(end, at.column + column_ + lane % kPieces * 4, params.columns);
    if (columns.count <= 0) return;
    const int64_t first = at.row + row_;
    for (int row = lane / kPieces; row < 8 * kTiles; row += 32 / kPieces) {
      if (first + row >= params.rows) return;
      const int piece = (lane % kPieces) ^ ((row >> 1 & 3) << 1);
      Sum four[4];
      memcpy(four, words + (row * kPieces + piece) * 4, sizeof four);
      columns.finish(end, first + row, four);
    }
  }

 private:
  TORCHWELD_INLINE Sum sum_at(int pair, int tile, int m, int i) const {
    if constexpr (__is_same(Total, int32_t)) {
      return sum_[pair][tile][m][i];
    } else {
      return static_cast<Sum>(total_[pair][tile][m][i]);
    }
  }

  int g_, t_, column_, row_;
  // Columns 4 g + 2 m and 4 g + 2 m + 1 of a pair of panels, rows 2 t and 2 t + 1 of 8.
  int32_t sum_[kPairs][kTiles][2][4] = {};
  Total total_[kPairs][kTiles][2][4] = {};
};

template <class Total, int kPairs, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) multiply_tile(QuantizedLinearParams params) {
  using S = Size<kPairs, kTiles>;
  TORCHWELD_DYNAMIC_SHARED(memory);
  const KPart part(params, tiles_of(params.rows, S::kRows) * tiles_of(params.columns, S::kColumns));
  const Place at(params, part.block, S{});
  const int64_t all = tiles_of(params.quads, kStepQuads);
  const int64_t begin = part.begin(all), steps = part.end(all);
  const auto copy = [&](int64_t step) {
    if (step < steps) copy_step<S>(params, at, step, memory + step % kStages * S::kStageBytes);
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) copy(begin + step);
  const int64_t group_quads = params.group_quads;
  const int64_t groups = group_quads ? (params.quads + group_quads - 1) / group_quads : 1;
  int64_t group = 0;
  Warp<Total, kPairs, kTiles> warp;
  for (int64_t step = begin; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step is there for all, and what was read before may be overwritten
    copy(step + kStages - 1);
    const unsigned char* stage = memory + step % kStages * S::kStageBytes;
    if constexpr (__is_same(Total, int32_t)) {
      warp.template multiply<true>(stage, 0, kStepQuads);
    } else {
      // The groups that have quads in this step.
      const int64_t first = step * kStepQuads;
      const int64_t last = params.quads - first < kStepQuads ? params.quads : first + kStepQuads;
      for (int64_t quad = first; quad < last;) {
        const int64_t end_of_group = (group + 1) * group_quads;
        const int64_t end = end_of_group < last ? end_of_group : last;
        warp.template multiply<false>(stage, static_cast<int>(quad - first),
                                      static_cast<int>(end - first));
        if (end == end_of_group || end == params.quads) {
          warp.end_group(params, at, group++, groups);
        }
        quad = end;
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  warp.finish(params, part.end_of(params), at, memory);
}

template <class Total, int kPairs, int kTiles>
cudaError_t launch_size(const QuantizedLinearParams& params, cudaStream_t stream) {
  using S = Size<kPairs, kTiles>;
  const int64_t tiles = tiles_of(params.rows, S::kRows) * tiles_of(params.columns, S::kColumns);
  return launch_with_shared(multiply_tile<Total, kPairs, kTiles>, KPart::blocks(params, tiles),
                            kThreads, kStages * S::kStageBytes, stream, params);
}

}  // namespace

cudaError_t launch_long_sums(const QuantizedLinearParams& params, int64_t quads,
                             cudaStream_t stream) {
  QuantizedLinearParams blocks = params;
  blocks.group_quads = quads;
  return launch_size<int64_t, 1, 4>(blocks, stream);
}

cudaError_t launch_tiles(const QuantizedLinearParams& params, bool large, cudaStream_t stream) {
  if (params.group_quads != 0) return launch_size<float, 1, 4>(params, stream);
  if (!is_one_sum(params.quads, 0)) return launch_long_sums(params, kLongGroupQuads, stream);
  return large ? launch_size<int32_t, 2, 8>(params, stream)
               : launch_size<int32_t, 1, 4>(params, stream);
}

namespace {

cudaError_t launch_sums(const QuantizedLinearParams& params, LinearPath path, int multiprocessors,
                        cudaStream_t stream) {
  if (path == LinearPath::few_rows && params.group_quads > 0 &&
      params.group_quads % kStepQuads == 0) {
    return launch_few_groups(params, stream);
  }
  if (!is_one_sum(params.quads, params.group_quads)) path = LinearPath::small_tiles;
  switch (path) {
    case LinearPath::few_rows:
      return launch_few_rows(params, multiprocessors, stream);
    case LinearPath::warpgroups:
    case LinearPath::wide_warpgroups:
      return launch_warpgroups(params, path == LinearPath::wide_warpgroups, stream);
    case LinearPath::small_tiles:
    case LinearPath::large_tiles:
      break;
  }
  return launch_tiles(params, path == LinearPath::large_tiles, stream);
}

}  // namespace

cudaError_t launch_quantized_linear(const QuantizedLinearParams& params, LinearPath path,
                                    int multiprocessors, cudaStream_t stream) {
  const cudaError_t error = launch_sums(params, path, multiprocessors, stream);
  if (error != cudaSuccess || params.splits <= 1) return error;
  return launch_join_parts(params, stream);
}

}  // namespace torchweld::kernels::cuda
