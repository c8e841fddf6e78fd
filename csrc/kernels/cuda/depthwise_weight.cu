// The gradient of a depthwise convolution's weight. A thread sums up products for a row of taps of
// its channels, at most some hundred in float32; a block adds up its threads' sums in double and
// leaves them, and a second kernel adds up what the blocks left, in order.
#include "kernels/cuda/depthwise_tiles.h"

namespace torchweld::kernels::cuda {
namespace {

// Sums are merged in pairs of taps: of an odd number the last has no partner.
inline int64_t sums_of(const DepthwiseShape& shape) {
  return int64_t{shape.rows.taps} * ((shape.columns.taps + 1) / 2) * shape.channels;
}

struct Operands {
  DepthwiseShape shape;
  const void *x, *grad_y;
  double* scratch;
};

// Products of a strip with the kS taps of a row without dilation.
template <class T, int kCount, int kS, int kStride, int kTaps>
TORCHWELD_INLINE void add_strip(const DepthwiseShape& shape, const Tile& tile, const T* x,
                                const T* grad, float (&sums)[kTaps][kCount]) {
  constexpr int kPixels = kStrip<kS, kStride, false>, kLoads = (kPixels - 1) * kStride + kS;
  const int begin = tile.strip * kPixels, first = begin * kStride - shape.columns.padding;
  T g[kPixels][kCount], loaded[kLoads][kCount];
#pragma unroll
  for (int j = 0; j < kPixels; ++j) {
    load_shared_group(grad + (begin + j) * shape.channels, begin + j < shape.columns.out_size,
                      g[j]);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const bool exists =
        static_cast<unsigned>(first + i) < static_cast<unsigned>(shape.columns.size);
    load_shared_group(x + (first + i) * shape.channels, exists, loaded[i]);
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    float values[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) values[v] = to_vec(loaded[i][v]);
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      const int s = i - j * kStride;
      if (s < 0 || s >= kS) continue;
#pragma unroll
      for (int v = 0; v < kCount; ++v) sums[s][v] = fma(values[v], to_vec(g[j][v]), sums[s][v]);
    }
  }
}

// The same of any two taps.
template <class T, int kCount>
TORCHWELD_INLINE void add_pair(const DepthwiseShape& shape, const Tile& tile, int s, const T* x,
                               const T* grad, float (&sums)[2][kCount]) {
  constexpr int kPixels = kStrip<0, 1, false>;
  for (int q = tile.strip * kPixels; q < (tile.strip + 1) * kPixels; ++q) {
    if (q >= shape.columns.out_size) break;
    T g[kCount], loaded[2][kCount];
    load_shared_group(grad + q * shape.channels, true, g);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      int column;
      const bool exists = find_tap<false>(shape.columns, q, s + t, column);
      load_shared_group(x + column * shape.channels, exists, loaded[t]);
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        sums[t][v] = fma(to_vec(loaded[t][v]), to_vec(g[v]), sums[t][v]);
      }
    }
  }
}

template <class T, int kCount, int kS, int kStride>
__global__ void __launch_bounds__(kThreads, 2) weight_gradient(Operands operands, Tiles tiles) {
  constexpr int kPairs = kS == 0 ? 1 : (kS + 1) / 2;
  const DepthwiseShape& shape = operands.shape;
  const Tile tile(tiles);
  const int pairs = (shape.columns.taps + 1) / 2;
  const int r = kS == 0 ? tile.unit / pairs : tile.unit;
  const int first_pair = kS == 0 ? tile.unit % pairs : 0;
  const int64_t channels = shape.channels, channel = static_cast<int64_t>(tile.group) * kCount;
  float sums[2 * kPairs][kCount] = {};
  for (int64_t row = tile.row; row < tile.end; row += tiles.down) {
    const int64_t n = static_cast<uint32_t>(row) / static_cast<uint32_t>(shape.rows.out_size);
    int h;
    if (!find_tap<false>(shape.rows, static_cast<int>(row - n * shape.rows.out_size), r, h)) {
      continue;
    }
    const T* x = static_cast<const T*>(operands.x) +
                 (n * shape.rows.size + h) * shape.columns.size * channels + channel;
    const T* grad =
        static_cast<const T*>(operands.grad_y) + row * shape.columns.out_size * channels + channel;
    if constexpr (kS > 0) {
      add_strip<T, kCount, kS, kStride>(shape, tile, x, grad, sums);
    } else {
      add_pair(shape, tile, 2 * first_pair, x, grad, sums);
    }
  }
  const int64_t all = static_cast<int64_t>(shape.rows.taps) * pairs * channels;
  double* const to = partial_at(operands.scratch, tile.part, all);
#pragma unroll
  for (int t = 0; t < kPairs; ++t) {
    Partial<kCount> mine{};
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      mine.first[v] = static_cast<double>(sums[2 * t][v]);
      mine.second[v] = static_cast<double>(sums[2 * t + 1][v]);
    }
    __syncthreads();  // what the pair before left may still be read
    combine_threads(tile.y, tiles.width * tiles.units, tiles.across * tiles.down, mine, AddSums{});
    if (tile.y != 0 || tile.group >= tiles.groups) continue;
    const int64_t at = (static_cast<int64_t>(r) * pairs + first_pair + t) * channels + channel;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      to[1 + at + v] = mine.first[v];
      to[1 + all + at + v] = mine.second[v];
    }
  }
  if (tile.slice == 0 && threadIdx.x == 0) to[0] = 0;
}

__global__ void __launch_bounds__(kThreads)
    finish_weight_gradient(DepthwiseWeightGradientParams params, int64_t parts) {
  const int pairs = (params.shape.columns.taps + 1) / 2;
  const int64_t channels = params.shape.channels, rows = params.shape.rows.taps;
  const int64_t all = rows * pairs * channels;
  const int64_t at = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                     threadIdx.x % static_cast<unsigned>(kFinishChannels);
  const Partial<1> total = total_of(params.scratch, parts, all, at, AddSums{});
  if (threadIdx.x >= kFinishChannels || at >= all) return;
  const int64_t c = at % channels, r = at / channels / pairs, s = 2 * (at / channels % pairs);
  const int64_t to = (c * rows + r) * params.shape.columns.taps + s;
  const ChannelResult result{params.grad_weight, params.shape.dtype};
  write_channel(result, to, total.first[0]);
  if (s + 1 < params.shape.columns.taps) write_channel(result, to + 1, total.second[0]);
}

// Blocks enough for 4 on each multiprocessor of an H200, of rows so few that float32 sums them
// well.
template <int kS, int kStride>
Tiles tiles_to_reduce(const DepthwiseShape& shape, int count) {
  const int units = static_cast<int>(weight_units(shape.rows.taps, shape.columns.taps, kS > 0));
  const int most_width = count == 1 ? 32 : 16, room = kThreads / units;
  return tiles_over(shape.channels / count, units, room < most_width ? room : most_width,
                    divide_up(shape.columns.out_size, kStrip<kS, kStride, false>),
                    shape.batch * shape.rows.out_size, 4 * 132, 4, 64);
}

// f.template operator()<kS, kStride>().
template <class F>
auto with_columns(const DepthwiseShape& shape, int count, const F& f) {
  const DepthwiseAxis& columns = shape.columns;
  if (count > 1 && columns.dilation == 1 && columns.stride <= 2) {
    const bool one = columns.stride == 1;
    if (columns.taps == 3) {
      return one ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
    }
    if (columns.taps == 5) {
      return one ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
    }
  }
  return f.template operator()<0, 1>();
}

}  // namespace

int64_t depthwise_scratch(const DepthwiseShape& shape) {
  int64_t most = 0;
  for (const int count : {1, depthwise_group(shape)}) {
    const int64_t parts = with_columns(shape, count, [&]<int kS, int kStride>() {
      return tiles_to_reduce<kS, kStride>(shape, count).parts();
    });
    if (parts > most) most = parts;
  }
  return most * (2 * sums_of(shape) + 1);
}

cudaError_t launch_depthwise_weight_gradient(const DepthwiseWeightGradientParams& params,
                                             cudaStream_t stream) {
  const DepthwiseShape& shape = params.shape;
  const int count = depthwise_group(shape, params.x, params.grad_y);
  const Operands operands{shape, params.x, params.grad_y, params.scratch};
  int64_t parts = 0;
  const cudaError_t error = depthwise_dispatch(shape.dtype, count, [&]<class T, int kCount>() {
    return with_columns(shape, kCount, [&]<int kS, int kStride>() {
      const Tiles tiles = tiles_to_reduce<kS, kStride>(shape, kCount);
      parts = tiles.parts();
      constexpr bool kKnown = kCount > 1;  // of single channels no columns are
      return launch(weight_gradient < T, kCount, kKnown * kS, kKnown ? kStride : 1 >,
                    tiles.blocks(), tiles.threads(), stream, operands, tiles);
    });
  });
  if (error != cudaSuccess) return error;
  return launch(finish_weight_gradient, divide_up(sums_of(shape), kFinishChannels), kThreads,
                stream, params, parts);
}

}  // namespace torchweld::kernels::cuda
