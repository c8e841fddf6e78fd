// How the threads of the depthwise kernels share a [N, H, W, C] tensor.
//
// A thread has a group of kCount channels, 16 bytes or one, and a strip of kStrip neighbouring
// pixels of a row, and steps from row to row. Side by side in a block lie groups, then units (what
// shares a strip: the rows of taps of a weight gradient), then strips, then rows; so neighbours
// read the same pixels, which the first level cache hands out again.
#pragma once

#include "kernels/cuda/batch_norm_walk.h"
#include "kernels/cuda/depthwise.h"

namespace torchweld::kernels::cuda {

// Pixels to a strip: as many as registers hold sums for, beside the kS taps of a row.
template <int kS, int kStride, bool kTransposed>
inline constexpr int kStrip = kTransposed    ? 4
                              : kStride == 2 ? 2
                              : kS == 5      ? 3
                                             : 4;

// Threads that share a strip in the weight gradient: one for each row of taps, or for each pair of
// them.
inline int64_t weight_units(int rows, int columns, bool known) {
  return known ? rows : int64_t{rows} * ((columns + 1) / 2);
}

struct Tiles {
  int width, units, across, down;
  int groups, slices;  // of channels; blocks side by side
  int strips, tiles;   // of a row; blocks across one
  int64_t rows, chunk, chunks;

  int64_t parts() const { return tiles * chunks; }
  int64_t blocks() const { return slices * parts(); }
  int threads() const { return (width * units * across * down + 31) / 32 * 32; }
};

// `most_width`: groups that a block may have. Blocks: as walk_over().
inline Tiles tiles_over(int64_t groups, int units, int most_width, int64_t strips, int64_t rows,
                        int64_t blocks, int64_t least, int64_t most) {
  Tiles t{};
  if (groups == 0 || strips == 0 || rows == 0) return t;
  t.units = units, t.rows = rows;
  t.groups = static_cast<int>(groups), t.strips = static_cast<int>(strips);
  t.slices = (t.groups + most_width - 1) / most_width;
  t.width = (t.groups + t.slices - 1) / t.slices;
  const int positions = kThreads / (t.width * units);
  t.tiles = (t.strips + positions - 1) / positions;
  t.across = (t.strips + t.tiles - 1) / t.tiles;
  const int most_rows = positions / t.across;
  t.down = static_cast<int>(rows < most_rows ? rows : most_rows);
  const int64_t steps = divide_up(rows, t.down);
  const int64_t per_block = divide_up(steps, divide_up(blocks, t.slices * t.tiles));
  t.chunk = (per_block < least ? least : per_block > most ? most : per_block) * t.down;
  t.chunks = divide_up(rows, t.chunk);
  return t;
}

// Where a thread is.
struct Tile {
  TORCHWELD_INLINE explicit Tile(const Tiles& t) {
    const auto block = static_cast<unsigned>(blockIdx.x);
    const auto thread = static_cast<int>(threadIdx.x);
    slice = static_cast<int>(block % static_cast<unsigned>(t.slices));
    part = block / static_cast<unsigned>(t.slices);
    x = thread % t.width;
    unit = thread / t.width % t.units;
    y = thread / (t.width * t.units);
    group = slice * t.width + x;
    strip = static_cast<int>(part % static_cast<unsigned>(t.tiles)) * t.across + y % t.across;
    const int64_t first = part / static_cast<unsigned>(t.tiles) * t.chunk;
    row = first + y / t.across;
    end = first + t.chunk < t.rows ? first + t.chunk : t.rows;
    if (y >= t.across * t.down || group >= t.groups || strip >= t.strips) end = row;
  }

  int slice, x, unit, y, group, strip;
  unsigned part;  // of all rows and strips
  int64_t row, end;
};

// Whether tap t of pixel p has a pixel on the other side of an axis, and which. "Transposed" goes
// from input to output.
template <bool kTransposed>
TORCHWELD_INLINE bool find_tap(const DepthwiseAxis& axis, int p, int t, int& found) {
  if constexpr (kTransposed) {
    const int at = p + axis.padding - t * axis.dilation;
    found = axis.stride == 1 ? at : at / axis.stride;
    return at >= 0 && found < axis.out_size && found * axis.stride == at;
  } else {
    found = p * axis.stride + t * axis.dilation - axis.padding;
    return found >= 0 && found < axis.size;
  }
}

// A group that other threads will read too; zeros where there is none.
template <class T, int kCount>
TORCHWELD_INLINE void load_shared_group(const T* from, bool exists, T (&to)[kCount]) {
  if constexpr (kCount == 1) {
    to[0] = exists ? *from : T{};
  } else {
    const Word word = exists ? *reinterpret_cast<const Word*>(from) : Word{};
    memcpy(to, &word, sizeof word);
  }
}

inline int depthwise_count(DType dtype) { return static_cast<int>(sizeof(Word) / size_of(dtype)); }

// Elements to a group.
template <class... Pointers>
int depthwise_group(const DepthwiseShape& shape, Pointers... pointers) {
  return group_of({1, shape.channels, 2, Layout::columns, shape.dtype}, pointers...);
}

// f.template operator()<T, kCount>().
template <class F>
cudaError_t depthwise_dispatch(DType dtype, int count, const F& f) {
  const bool words = count > 1;
  switch (dtype) {
    case DType::float32:
      return words ? f.template operator()<float, 4>() : f.template operator()<float, 1>();
    case DType::bfloat16:
      return words ? f.template operator()<BFloat16, 8>() : f.template operator()<BFloat16, 1>();
    case DType::float16:
      return words ? f.template operator()<Float16, 8>() : f.template operator()<Float16, 1>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace torchweld::kernels::cuda
