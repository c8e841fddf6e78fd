// Depthwise convolution, and its gradient for the input: the same sums with taps that meet other
// pixels. A thread reads the pixels of a strip once for each row of taps, and its taps stay in
// registers for the strip.
#include "kernels/cuda/async.h"
#include "kernels/cuda/depthwise_tiles.h"

namespace torchweld::kernels::cuda {
namespace {

// "to" is what is computed, output or gradient of the input; "from" what is read.
struct Pass {
  DepthwiseShape shape;
  const void* from;
  const void* weight;
  void* to;
  int to_rows, to_columns, from_rows, from_columns;
  ChannelValues bias{};
  const void* residual = nullptr;
  Activation activation = Activation::identity;
  double negative_slope = 0;
  bool flipped = false;  // the last tap is the first
  // Strip k begins on column k * kPixels + begin and reads from column k * step + first on.
  int begin = 0, step = 0, first = 0;
};

// The taps of a block's channels and, behind them, the bias: [taps + 1][channels] in float32. Of a
// group, four floats lie together, so that neighbouring threads read neighbouring words.
template <int kCount>
TORCHWELD_INLINE int place_of(int tap, int x, int j, int width) {
  if constexpr (kCount <= 4) {
    return (tap * width + x) * kCount + j;
  } else {
    return ((tap * (kCount / 4) + j / 4) * width + x) * 4 + j % 4;
  }
}

template <int kCount>
TORCHWELD_INLINE void read_taps(const float* table, int tap, int x, int width,
                                float (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = table[place_of<1>(tap, x, 0, width)];
  } else {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const Word word = *reinterpret_cast<const Word*>(table + place_of<kCount>(tap, x, j, width));
      memcpy(to + j, &word, sizeof word);
    }
  }
}

template <class T, int kCount>
TORCHWELD_INLINE void fill_table(const Pass& pass, const Tiles& tiles, int slice, float* table) {
  const int taps = pass.shape.rows.taps * pass.shape.columns.taps;
  const int64_t first = static_cast<int64_t>(slice) * tiles.width * kCount;
  const int64_t left = pass.shape.channels - first, most = tiles.width * kCount;
  const int channels = static_cast<int>(left < most ? left : most);
  const T* weight = static_cast<const T*>(pass.weight) + first * taps;
  for (int i = static_cast<int>(threadIdx.x); i < channels * taps;
       i += static_cast<int>(blockDim.x)) {
    const int c = i / taps, tap = i - c * taps, to = pass.flipped ? taps - 1 - tap : tap;
    table[place_of<kCount>(to, c / kCount, c % kCount, tiles.width)] = to_vec(weight[i]);
  }
  for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
    table[place_of<kCount>(taps, c / kCount, c % kCount, tiles.width)] =
        static_cast<float>(read_channel(pass.bias, first + c));
  }
  __syncthreads();
}

// Columns of a kernel that its template knows: kS taps without dilation. Load i of a strip meets
// tap s for pixel j of the strip where at(j, s) == i.
template <int kS, int kStride, bool kTransposed>
struct Known {
  static constexpr int kPixels = kStrip<kS, kStride, kTransposed>;
  static constexpr int kLoads =
      kTransposed ? (kPixels - 1) / kStride + (kS - 1) / kStride + 1 : (kPixels - 1) * kStride + kS;
  static constexpr bool meet(int j, int s) { return !kTransposed || (j - s) % kStride == 0; }
  static constexpr int at(int j, int s) {
    return kTransposed ? (kS - 1) / kStride + (j - s) / kStride : j * kStride + s;
  }
};

// Adds one row of taps to the sums of a strip.
template <class T, int kCount, int kS, int kStride, bool kTransposed, int kPixels>
TORCHWELD_INLINE void add_row(const Pass& pass, const Tiles& tiles, const Tile& tile, const T* line,
                              const float* table, int r, float (&sums)[kPixels][kCount]) {
  const int first = tile.strip * pass.step + pass.first;
  const int columns = pass.shape.columns.taps;
  if constexpr (kS > 0) {
    using K = Known<kS, kStride, kTransposed>;
    T loaded[K::kLoads][kCount];
#pragma unroll
    for (int i = 0; i < K::kLoads; ++i) {
      const bool exists =
          static_cast<unsigned>(first + i) < static_cast<unsigned>(pass.from_columns);
      load_shared_group(line + (first + i) * pass.shape.channels, exists, loaded[i]);
    }
    float taps[kS][kCount];
#pragma unroll
    for (int s = 0; s < kS; ++s) read_taps(table, r * kS + s, tile.x, tiles.width, taps[s]);
#pragma unroll
    for (int i = 0; i < K::kLoads; ++i) {
      float values[kCount];
#pragma unroll
      for (int v = 0; v < kCount; ++v) values[v] = to_vec(loaded[i][v]);
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
#pragma unroll
        for (int s = 0; s < kS; ++s) {
          if (!K::meet(j, s) || K::at(j, s) != i) continue;
#pragma unroll
          for (int v = 0; v < kCount; ++v) sums[j][v] = fma(values[v], taps[s][v], sums[j][v]);
        }
      }
    }
  } else {
    for (int s = 0; s < columns; ++s) {
      float taps[kCount];
      read_taps(table, r * columns + s, tile.x, tiles.width, taps);
      T loaded[kPixels][kCount];
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        int column;
        const bool exists =
            find_tap<kTransposed>(pass.shape.columns, tile.strip * kPixels + j, s, column);
        load_shared_group(line + column * pass.shape.channels, exists, loaded[j]);
      }
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          sums[j][v] = fma(to_vec(loaded[j][v]), taps[v], sums[j][v]);
        }
      }
    }
  }
}

template <class T, int kCount, int kS, int kStride, bool kTransposed>
__global__ void __launch_bounds__(kThreads, 2) convolve(Pass pass, Tiles tiles) {
  TORCHWELD_DYNAMIC_SHARED(shared);
  float* const table = reinterpret_cast<float*>(shared);
  const Tile tile(tiles);
  fill_table<T, kCount>(pass, tiles, tile.slice, table);
  constexpr int kPixels = kStrip<kS, kStride, kTransposed>;
  const int64_t channels = pass.shape.channels, channel = static_cast<int64_t>(tile.group) * kCount;
  const int begin = tile.strip * kPixels + pass.begin;
  for (int64_t row = tile.row; row < tile.end; row += tiles.down) {
    const int64_t n = static_cast<uint32_t>(row) / static_cast<uint32_t>(pass.to_rows);
    const int p = static_cast<int>(row - n * pass.to_rows);
    float sums[kPixels][kCount] = {};
    for (int r = 0; r < pass.shape.rows.taps; ++r) {
      int h;
      if (!find_tap<kTransposed>(pass.shape.rows, p, r, h)) continue;
      const T* line = static_cast<const T*>(pass.from) +
                      (n * pass.from_rows + h) * pass.from_columns * channels + channel;
      add_row<T, kCount, kS, kStride, kTransposed>(pass, tiles, tile, line, table, r, sums);
    }
    float bias[kCount];
    read_taps(table, pass.shape.rows.taps * pass.shape.columns.taps, tile.x, tiles.width, bias);
    const int64_t offset = (row * pass.to_columns + begin) * channels + channel;
    T* const to = static_cast<T*>(pass.to) + offset;
    const T* const residual = static_cast<const T*>(pass.residual);
    T added[kPixels][kCount];
    if (residual != nullptr) {
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        if (begin + j < 0 || begin + j >= pass.to_columns) continue;
        load(residual + offset + j * channels, added[j]);
      }
    }
    with_activation<T>(pass.activation, pass.negative_slope, [&](auto activate) {
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        if (begin + j < 0 || begin + j >= pass.to_columns) continue;
        T result[kCount];
#pragma unroll
        for (int v = 0; v < kCount; ++v) {
          float z = sums[j][v] + bias[v];
          if (residual != nullptr) z = z + to_vec(added[j][v]);
          result[v] = from_vec<T>(activate.value(z));
        }
        store(to + j * channels, result);
      }
    });
  }
}

int64_t table_bytes(const DepthwiseShape& shape, int width, int count) {
  return (int64_t{shape.rows.taps} * shape.columns.taps + 1) * width * count *
         static_cast<int64_t>(sizeof(float));
}

// Groups side by side: 256 bytes of a pixel, as far as their taps have room.
int most_width(const DepthwiseShape& shape, int count) {
  const int64_t most = count == 1 ? 32 : 16, room = kLeastShared / table_bytes(shape, 1, count);
  return static_cast<int>(room < most ? room : most);
}

template <class T, int kCount, int kS, int kStride, bool kTransposed>
cudaError_t start_known(Pass pass, cudaStream_t stream) {
  constexpr int kPixels = kStrip<kS, kStride, kTransposed>;
  const DepthwiseAxis& columns = pass.shape.columns;
  if constexpr (kS > 0 && kTransposed) {
    // Strips begin where tap 0 meets a pixel.
    pass.begin = -(columns.padding % kStride);
    pass.step = kPixels / kStride;
    pass.first = columns.padding / kStride - (kS - 1) / kStride;
  } else {
    pass.begin = 0;
    pass.step = kPixels * columns.stride;
    pass.first = -columns.padding;
  }
  const Tiles tiles = tiles_over(pass.shape.channels / kCount, 1, most_width(pass.shape, kCount),
                                 divide_up(pass.to_columns - pass.begin, kPixels),
                                 pass.shape.batch * pass.to_rows, 16 * 132, 1, 16);
  return launch_with_shared(convolve<T, kCount, kS, kStride, kTransposed>, tiles.blocks(),
                            tiles.threads(), table_bytes(pass.shape, tiles.width, kCount), stream,
                            pass, tiles);
}

template <class T, int kCount, bool kTransposed>
cudaError_t start(const Pass& pass, cudaStream_t stream) {
  const DepthwiseAxis& columns = pass.shape.columns;
  const auto is = [&](int taps, int stride) {
    return columns.taps == taps && columns.stride == stride && columns.dilation == 1;
  };
  if constexpr (kCount > 1) {
    if constexpr (!kTransposed) {
      if (is(3, 1)) return start_known<T, kCount, 3, 1, false>(pass, stream);
      if (is(5, 1)) return start_known<T, kCount, 5, 1, false>(pass, stream);
    }
    if (is(3, 2)) return start_known<T, kCount, 3, 2, kTransposed>(pass, stream);
    if (is(5, 2)) return start_known<T, kCount, 5, 2, kTransposed>(pass, stream);
  }
  return start_known<T, kCount, 0, 1, kTransposed>(pass, stream);
}

}  // namespace

cudaError_t launch_depthwise(const DepthwiseForwardParams& params, cudaStream_t stream) {
  const DepthwiseShape& shape = params.shape;
  const int count = depthwise_group(shape, params.x, params.residual, params.y);
  return depthwise_dispatch(shape.dtype, count, [&]<class T, int kCount>() {
    return start<T, kCount, false>({.shape = shape,
                                    .from = params.x,
                                    .weight = params.weight,
                                    .to = params.y,
                                    .to_rows = shape.rows.out_size,
                                    .to_columns = shape.columns.out_size,
                                    .from_rows = shape.rows.size,
                                    .from_columns = shape.columns.size,
                                    .bias = params.bias,
                                    .residual = params.residual,
                                    .activation = params.activation,
                                    .negative_slope = params.negative_slope},
                                   stream);
  });
}

cudaError_t launch_depthwise_input_gradient(const DepthwiseInputGradientParams& params,
                                            cudaStream_t stream) {
  Pass pass{.shape = params.shape,
            .from = params.grad_y,
            .weight = params.weight,
            .to = params.grad_x,
            .to_rows = params.shape.rows.size,
            .to_columns = params.shape.columns.size,
            .from_rows = params.shape.rows.out_size,
            .from_columns = params.shape.columns.out_size};
  // With stride 1 it is a convolution like any other.
  pass.flipped = params.shape.rows.stride == 1 && params.shape.columns.stride == 1;
  if (pass.flipped) {
    for (DepthwiseAxis* axis : {&pass.shape.rows, &pass.shape.columns}) {
      const int size = axis->size;
      axis->size = axis->out_size, axis->out_size = size;
      axis->padding = axis->dilation * (axis->taps - 1) - axis->padding;
    }
  }
  const int count = depthwise_group(pass.shape, params.grad_y, params.grad_x);
  return depthwise_dispatch(pass.shape.dtype, count, [&]<class T, int kCount>() {
    return pass.flipped ? start<T, kCount, false>(pass, stream)
                        : start<T, kCount, true>(pass, stream);
  });
}

bool depthwise_can(const DepthwiseShape& shape) {
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto fits = [&](const DepthwiseAxis& axis) {
    // Distances along an axis are computed in 32 bits.
    const int64_t reach = int64_t{axis.taps} * axis.dilation + axis.padding;
    return (axis.size + reach) * 2 < kMost &&
           (axis.out_size + 8) * int64_t{axis.stride} + reach < kMost;
  };
  const int64_t rows =
      shape.rows.size > shape.rows.out_size ? shape.rows.size : shape.rows.out_size;
  const int count = depthwise_count(shape.dtype);
  return shape.dtype != DType::float64 && shape.channels < kMost && fits(shape.rows) &&
         fits(shape.columns) && shape.batch * rows < kMost &&
         table_bytes(shape, 1, count) <= kLeastShared &&
         weight_units(shape.rows.taps, shape.columns.taps, false) <= kThreads;
}

}  // namespace torchweld::kernels::cuda
