// How the threads of the batch norm kernels walk over a tensor.
//
// A thread moves a group of kCount elements at a time: 16 bytes, or one element where the channels
// (columns) or the pixels (planes) are no multiple of that, or memory is not aligned. It stays with
// its columns, or its channel, and steps from row to row, so what belongs to a channel stays in
// registers. A row is a pixel (columns), or a part of a plane of one channel (planes).
#pragma once

#include "kernels/conv_bn_relu_math.h"
#include "kernels/cuda/batch_norm.h"
#include "kernels/cuda/launch.h"

namespace torchweld::kernels::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kSliceBytes = 256;  // of a row that a block of "columns" takes
inline constexpr int kSliceColumns = kSliceBytes / 2;

struct Walk {
  bool planes;
  int width, height;  // the block's threads: groups of a row, rows
  int64_t groups;     // of a row of all channels (columns), of a plane (planes)
  int64_t slices;     // blocks side by side: parts of a row (columns), channels (planes)
  int64_t parts;      // rows to a plane; 1 for columns
  int64_t rows, stride;
  int64_t channel_stride;
  int64_t chunk, chunks;  // rows of a block; blocks one after the other

  int64_t blocks() const { return slices * chunks; }
  int threads() const { return (width * height + 31) / 32 * 32; }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `count`: elements to a group. `blocks`: how many to aim at, by chunks of at least `least` and at
// most `most` rows to a thread.
inline Walk walk_over(const BatchNormShape& shape, int count, int64_t blocks, int64_t least,
                      int64_t most, int64_t slice_bytes = kSliceBytes) {
  Walk walk{};
  if (shape.size() == 0) return walk;
  int64_t batch = shape.batch, pixels = shape.pixels;
  if (shape.channels == 1) pixels *= batch, batch = 1;  // one plane, whatever memory is called
  walk.planes = pixels > 1 && (shape.layout == Layout::planes || shape.channels == 1);
  walk.groups = (walk.planes ? pixels : shape.channels) / count;
  const int64_t slice = slice_bytes / (count * static_cast<int64_t>(size_of(shape.dtype)));
  const int64_t parts = divide_up(walk.groups, walk.planes ? kThreads : slice);
  walk.width = static_cast<int>(divide_up(walk.groups, parts));
  walk.slices = walk.planes ? shape.channels : parts;
  walk.parts = walk.planes ? parts : 1;
  walk.rows = walk.planes ? batch * parts : batch * pixels;
  const int64_t most_rows = kThreads / walk.width;
  walk.height = static_cast<int>(walk.rows < most_rows ? walk.rows : most_rows);
  walk.stride = walk.planes ? shape.channels * pixels : shape.channels;
  walk.channel_stride = pixels;
  const int64_t steps = divide_up(walk.rows, walk.height);
  const int64_t per_block = divide_up(steps, divide_up(blocks, walk.slices));
  const int64_t chosen = per_block < least ? least : per_block > most ? most : per_block;
  walk.chunk = chosen * walk.height;
  walk.chunks = divide_up(walk.rows, walk.chunk);
  return walk;
}

// A reduction: blocks enough for 8 on each of an H200's multiprocessors and no more, as each leaves
// a partial result. The number does not come from the device, on which no result may depend.
inline Walk walk_to_reduce(const BatchNormShape& shape, int count) {
  return walk_over(shape, count, 8 * 132, 4, INT64_MAX);
}
// Elementwise: in a large tensor, blocks that are large against their start, which computes
// coefficients.
inline Walk walk_to_map(const BatchNormShape& shape, int count) {
  return walk_over(shape, count, 16 * 132, 1, 16);
}

// Of a small tensor: a block has its channels all to itself, as few as a sector of memory holds.
inline Walk walk_alone(const BatchNormShape& shape, int count) {
  return walk_over(shape, count, 1, 1, INT64_MAX, 32);
}

// Elements to a group.
template <class... Pointers>
int group_of(const BatchNormShape& shape, Pointers... pointers) {
  const int count = static_cast<int>(sizeof(Word) / size_of(shape.dtype));
  const bool planes = shape.layout == Layout::planes && shape.pixels > 1;
  const int64_t row = shape.channels == 1 ? shape.values() : planes ? shape.pixels : shape.channels;
  [[maybe_unused]] const auto aligned = [](const void* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(Word) == 0;
  };
  return row % count == 0 && (aligned(pointers) && ...) ? count : 1;
}

// f.template operator()<T, kCount>() for a dtype and a group of `count`.
template <class F>
cudaError_t dispatch(DType dtype, int count, const F& f) {
  const bool words = count > 1;
  switch (dtype) {
    case DType::float32:
      return words ? f.template operator()<float, 4>() : f.template operator()<float, 1>();
    case DType::float64:
      return words ? f.template operator()<double, 2>() : f.template operator()<double, 1>();
    case DType::bfloat16:
      return words ? f.template operator()<BFloat16, 8>() : f.template operator()<BFloat16, 1>();
    case DType::float16:
      return words ? f.template operator()<Float16, 8>() : f.template operator()<Float16, 1>();
  }
  return cudaErrorInvalidValue;
}

// Groups a thread loads before it works on them, of each tensor.
template <class T, int kCount>
inline constexpr int kUnroll = kCount == 1 && sizeof(T) < 8 ? 8 : 4;

template <int kCount>
struct Walker {
  TORCHWELD_INLINE Walker(const Walk& w, int64_t block) : walk(w) {
    slice = block % w.slices;
    chunk = block / w.slices;
    x = static_cast<int>(threadIdx.x) % w.width;
    y = static_cast<int>(threadIdx.x) / w.width;
    row = chunk * w.chunk + y;
    end = (chunk + 1) * w.chunk < w.rows ? (chunk + 1) * w.chunk : w.rows;
    const int64_t group = w.planes ? x : slice * w.width + x;
    base = group * kCount + (w.planes ? slice * w.channel_stride : 0);
    if (y >= w.height || group >= w.groups) end = row;
  }

  // Whether this thread has a group in a row, and where it begins.
  TORCHWELD_INLINE bool find(int64_t r, int64_t& offset) const {
    if (r >= end) return false;
    if (walk.parts == 1) {
      offset = base + r * walk.stride;
      return true;
    }
    // Rows of planes are fewer than 2^32: each is hundreds of elements.
    const uint32_t parts = static_cast<uint32_t>(walk.parts), n = static_cast<uint32_t>(r) / parts;
    const int64_t first = static_cast<int64_t>(static_cast<uint32_t>(r) - n * parts) * walk.width;
    offset = base + n * walk.stride + first * kCount;
    return first + x < walk.groups;
  }

  // The channels of a block, and of this thread's element j.
  TORCHWELD_INLINE int64_t first_channel() const {
    return walk.planes ? slice : slice * walk.width * kCount;
  }
  TORCHWELD_INLINE int channels() const {
    if (walk.planes) return 1;
    const int64_t left = walk.groups - slice * walk.width;
    return static_cast<int>(left < walk.width ? left : walk.width) * kCount;
  }
  TORCHWELD_INLINE int place(int j) const { return walk.planes ? 0 : x * kCount + j; }

  const Walk& walk;
  int64_t slice, chunk, row, end, base;
  int x, y;
};

template <class T, int kCount>
TORCHWELD_INLINE void load(const T* from, T (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = *from;
  } else {
    const Word word = __ldcg(reinterpret_cast<const Word*>(from));
    memcpy(to, &word, sizeof word);
  }
}
template <class T, int kCount>
TORCHWELD_INLINE void store(T* to, const T (&from)[kCount]) {
  if constexpr (kCount == 1) {
    *to = from[0];
  } else {
    Word word;
    memcpy(&word, from, sizeof word);
    *reinterpret_cast<Word*>(to) = word;
  }
}

// --- values of a channel -------------------------------------------------------------------------
TORCHWELD_INLINE double read_channel(const ChannelValues& values, int64_t c) {
  if (values.data == nullptr) return values.otherwise;
  switch (values.dtype) {
    case DType::float32:
      return static_cast<const float*>(values.data)[c];
    case DType::float64:
      return static_cast<const double*>(values.data)[c];
    case DType::bfloat16:
      return to_vec(static_cast<const BFloat16*>(values.data)[c]);
    default:
      return to_vec(static_cast<const Float16*>(values.data)[c]);
  }
}

TORCHWELD_INLINE void write_channel(const ChannelResult& result, int64_t c, double value) {
  if (result.data == nullptr) return;
  const float narrow = static_cast<float>(value);
  switch (result.dtype) {
    case DType::float32:
      static_cast<float*>(result.data)[c] = narrow;
      break;
    case DType::float64:
      static_cast<double*>(result.data)[c] = value;
      break;
    case DType::bfloat16:
      static_cast<BFloat16*>(result.data)[c] = from_vec<BFloat16>(narrow);
      break;
    default:
      static_cast<Float16*>(result.data)[c] = from_vec<Float16>(narrow);
  }
}

// 1 / sqrt(variance + eps). Everything that needs it for the same statistics gets the same bits.
TORCHWELD_INLINE double inverse_std(double variance, double eps) {
  return 1 / ::sqrt(variance + eps);
}

TORCHWELD_INLINE ChannelNorm norm_of(const BatchNormInput& bn, int64_t c) {
  const double spread = read_channel(bn.invstd, c);
  return {read_channel(bn.mean, c), bn.of_variance ? inverse_std(spread, bn.eps) : spread,
          read_channel(bn.weight, c), read_channel(bn.bias, c)};
}

// f(Activate<...>) for the activation.
template <class T, class F>
TORCHWELD_INLINE void with_activation(Activation activation, double negative_slope, const F& f) {
  const auto slope = static_cast<typename Math<T>::Scalar>(negative_slope);
  switch (activation) {
    case Activation::identity:
      return f(Activate<Activation::identity, T>{slope});
    case Activation::relu:
      return f(Activate<Activation::relu, T>{slope});
    case Activation::relu6:
      return f(Activate<Activation::relu6, T>{slope});
    case Activation::leaky_relu:
      return f(Activate<Activation::leaky_relu, T>{slope});
    case Activation::silu:
      return f(Activate<Activation::silu, T>{slope});
    case Activation::hardswish:
      return f(Activate<Activation::hardswish, T>{slope});
  }
}
template <class T, class F>
TORCHWELD_INLINE void with_activation(const BatchNormInput& bn, const F& f) {
  with_activation<T>(bn.activation, bn.negative_slope, f);
}

// What a thread normalizes its elements with. A block computes it once for all its threads, which
// must all come here.
template <class T, int kCount>
struct Coefficients {
  using Vec = typename Math<T>::Vec;

  TORCHWELD_INLINE Coefficients(const BatchNormInput& bn, const Walker<kCount>& walker) {
    __shared__ Vec shared[3][kSliceColumns];
    for (int k = static_cast<int>(threadIdx.x); k < walker.channels();
         k += static_cast<int>(blockDim.x)) {
      const ChannelNorm norm = norm_of(bn, walker.first_channel() + k);
      shared[0][k] = static_cast<Vec>(norm.mean);
      shared[1][k] = static_cast<Vec>(norm.scale());
      shared[2][k] = static_cast<Vec>(norm.shift(norm.template lost<Vec>()));
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int place = walker.place(j);
      mean[j] = shared[0][place];
      scale[j] = shared[1][place];
      shift[j] = shared[2][place];
    }
  }

  // Element j before the activation; d: its distance from the mean. Forward and backward both come
  // here, so the backward sees the very z the forward activated.
  TORCHWELD_INLINE Vec normalized(int j, T x, Vec& d) const {
    d = to_vec(x) - mean[j];
    return fma(d, scale[j], shift[j]);
  }

  Vec mean[kCount], scale[kCount], shift[kCount];
};

// --- partial results -----------------------------------------------------------------------------
// Of a thread's columns: statistics (mean, m2) of `count` values each, or two sums.
template <int kCount>
struct Partial {
  double count, first[kCount], second[kCount];
};

struct MergeStatistics {
  TORCHWELD_INLINE void operator()(double count, double& mean, double& m2, double other_count,
                                   double other_mean, double other_m2) const {
    if (other_count == 0) return;
    Merge{count, other_count}(other_mean, 0.0, other_m2, mean, m2);
  }
};
struct AddSums {
  TORCHWELD_INLINE void operator()(double, double& first, double& second, double,
                                   double other_first, double other_second) const {
    first += other_first;
    second += other_second;
  }
};

// Thread y * width + x holds columns x; adds up those of all y < height in a fixed order, to what
// thread x holds.
template <int kCount, class Add>
TORCHWELD_INLINE void combine_threads(int y, int width, int height, Partial<kCount>& mine,
                                      const Add& add) {
  __shared__ double counts[kThreads], first[kCount][kThreads], second[kCount][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int n = height; n > 1;) {
    const int half = (n + 1) / 2;
    if (y >= half && y < n) {
      counts[thread] = mine.count;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        first[j][thread] = mine.first[j];
        second[j][thread] = mine.second[j];
      }
    }
    __syncthreads();
    if (y < n - half) {
      const int other = thread + half * width;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        add(mine.count, mine.first[j], mine.second[j], counts[other], first[j][other],
            second[j][other]);
      }
      mine.count += counts[other];
    }
    n = half;
  }
}

// Where chunk k of all channels is: count, then C times `first`, then C times `second`.
TORCHWELD_INLINE double* partial_at(double* scratch, int64_t chunk, int64_t channels) {
  return scratch + chunk * (2 * channels + 1);
}

// Adds up what a block's threads hold, and writes it.
template <int kCount, class Add>
TORCHWELD_INLINE void write_partial(const Walker<kCount>& walker, int64_t channels,
                                    Partial<kCount>& mine, double* scratch, const Add& add) {
  const Walk& walk = walker.walk;
  double* to = partial_at(scratch, walker.chunk, channels);
  const int64_t channel = walker.first_channel() + walker.place(0);
  if (!walk.planes) {
    combine_threads(walker.y, walk.width, walk.height, mine, add);
    if (walker.y != 0 || channel >= channels) return;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      to[1 + channel + j] = mine.first[j];
      to[1 + channels + channel + j] = mine.second[j];
    }
    if (channel == 0) to[0] = mine.count;
    return;
  }
  // All of one channel: first what the thread holds, in pairs.
#pragma unroll
  for (int n = kCount / 2; n > 0; n /= 2) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      add(mine.count, mine.first[j], mine.second[j], mine.count, mine.first[j + n],
          mine.second[j + n]);
    }
    mine.count *= 2;
  }
  Partial<1> one{mine.count, {mine.first[0]}, {mine.second[0]}};
  combine_threads(static_cast<int>(threadIdx.x), 1, walk.width * walk.height, one, add);
  if (threadIdx.x != 0) return;
  to[1 + channel] = one.first[0];
  to[1 + channels + channel] = one.second[0];
  if (channel == 0) to[0] = one.count;
}

inline constexpr int kFinishChannels = 8;  // of a block that adds up partial results

// The total of a channel, in threads 0 to kFinishChannels - 1; the others must come too.
template <class Add>
TORCHWELD_INLINE Partial<1> total_of(const double* scratch, int64_t chunks, int64_t channels,
                                     int64_t channel, const Add& add) {
  constexpr int kHeight = kThreads / kFinishChannels;
  const int y = static_cast<int>(threadIdx.x) / kFinishChannels;
  Partial<1> total{};
  if (channel < channels) {
#pragma unroll 4
    for (int64_t k = y; k < chunks; k += kHeight) {
      const double* from = partial_at(const_cast<double*>(scratch), k, channels);
      add(total.count, total.first[0], total.second[0], from[0], from[1 + channel],
          from[1 + channels + channel]);
      total.count += from[0];
    }
  }
  combine_threads(y, kFinishChannels, kHeight, total, add);
  return total;
}

}  // namespace torchweld::kernels::cuda
