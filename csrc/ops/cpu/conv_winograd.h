// What the passes of winograd_convolution() share.
#pragma once

#include <algorithm>
#include <iterator>

#include "kernels/winograd.h"
#include "ops/cpu/convolution.h"

namespace torchweld::ops::winograd {

using kernels::kPanelGroup;
using kernels::kWinogradPoints;
using kernels::kWinogradTile;
using kernels::WinogradWindow;

// The size of parts that cover `total`, as even as can be, none above `most`.
inline int64_t even_part(int64_t total, int64_t most) {
  return divide_up(total, std::max<int64_t>(1, divide_up(total, most)));
}

// Floats from one point's matrix to the next. A cache line more than the matrix has: at a distance
// of 4096 bytes all 36 points of a tile would compete for the same few lines of the first cache.
inline int64_t point_stride(int64_t rows, int64_t columns) {
  return kPanelGroup * (divide_up(rows * columns, kPanelGroup) + 1);
}

// The next block's pixels are fetched during the products of the points from this one on, so that
// they have arrived, and are still in the core's cache, when they are read.
inline constexpr int64_t kAheadPoint = kWinogradPoints / 2;

// Up to kPanel of `total` channels.
struct Panel {
  Panel(int64_t index, int64_t total)
      : index(index),
        first(index * kernels::kPanel),
        columns(std::min(kernels::kPanel, total - first)),
        width(kPanelGroup * divide_up(columns, kPanelGroup)) {}

  int64_t index, first, columns;
  int64_t width;  // columns of a packed weight
};

// Where a block's transformed tiles lie: [panels of channels][36][tiles][a panel's columns]. What a
// product reads of a panel is contiguous, and short enough for the nearest cache.
class Points {
 public:
  Points(int64_t channels, int64_t tiles) : channels_(channels), tiles_(tiles) {}

  int64_t panels() const { return divide_up(channels_, kernels::kPanel); }
  Panel panel(int64_t index) const { return Panel(index, channels_); }

  int64_t size() const { return offset(panels()); }
  // Floats before a panel.
  int64_t offset(int64_t panel) const {
    return panel * kWinogradPoints * point_stride(tiles_, kernels::kPanel);
  }
  // Floats from a point to the next.
  int64_t stride(const Panel& panel) const { return point_stride(tiles_, panel.columns); }

  // Transforms one tile of an image.
  template <class T>
  void gather(kernels::WinogradGatherKernel<T> kernel, const T* image, const WinogradWindow& window,
              int64_t tile, float* points) const {
    for (int64_t i = 0; i < panels(); ++i) {
      const Panel here = panel(i);
      kernel(image + here.first, window, here.columns, points + offset(i) + tile * here.columns,
             stride(here));
    }
  }

 private:
  int64_t channels_, tiles_;
};

// The tiles of an output, numbered by image, row and column.
class Tiles {
 public:
  explicit Tiles(const ConvolutionShape& shape)
      : shape_(shape),
        rows_(divide_up(shape.out_height, kWinogradTile)),
        columns_(divide_up(shape.out_width, kWinogradTile)) {}

  int64_t count() const { return shape_.batch * rows_ * columns_; }
  int64_t columns() const { return columns_; }

  int64_t image(int64_t tile) const { return tile / (rows_ * columns_); }
  WinogradWindow output(int64_t tile, int64_t pixel) const {
    return {shape_.out_height, shape_.out_width, pixel, y(tile), x(tile)};
  }
  WinogradWindow input(int64_t tile, int64_t pixel) const {
    return {shape_.height, shape_.width, pixel, y(tile) - shape_.padding_height,
            x(tile) - shape_.padding_width};
  }

  // The pixels of an image of the output's size in tiles [begin, end), to be fetched ahead.
  template <class T>
  void add(int64_t begin, int64_t end, const T* image, int64_t channels,
           kernels::Ahead& ahead) const {
    for_each_run(begin, end, [&](int64_t first, int64_t pixels) {
      if (ahead.count == std::ssize(ahead.stretches)) return;
      const int64_t bytes = pixels * channels * static_cast<int64_t>(sizeof(T));
      ahead.add(reinterpret_cast<const float*>(image + first * channels), bytes / 4);
    });
  }
  // What gathering these tiles is the first to read of the input, those before them done: it begins
  // a pixel and a row below the tiles' own. Only where input and output are of one size.
  template <class T>
  void add_patches(int64_t begin, int64_t end, const T* input, int64_t channels,
                   kernels::Ahead& ahead) const {
    if (shape_.height != shape_.out_height || shape_.width != shape_.out_width) return;
    add(begin, end, input + (shape_.width + 1) * channels, channels, ahead);
  }

  // f(first pixel, pixels) over the output's pixels in tiles [begin, end), in as few runs as may
  // be.
  template <class F>
  void for_each_run(int64_t begin, int64_t end, const F& f) const {
    int64_t first = 0, pixels = 0;
    for (int64_t tile = begin; tile < end;) {
      const int64_t next = std::min(end, tile + columns_ - tile % columns_);
      const int64_t left = x(tile),
                    width = std::min(shape_.out_width, left + (next - tile) * kWinogradTile) - left;
      const int64_t bottom = std::min(shape_.out_height, y(tile) + kWinogradTile);
      for (int64_t row = y(tile); row < bottom; ++row) {
        const int64_t start = (image(tile) * shape_.out_height + row) * shape_.out_width + left;
        if (start != first + pixels) {
          if (pixels > 0) f(first, pixels);
          first = start;
          pixels = 0;
        }
        pixels += width;
      }
      tile = next;
    }
    if (pixels > 0) f(first, pixels);
  }

 private:
  int64_t y(int64_t tile) const { return tile / columns_ % rows_ * kWinogradTile; }
  int64_t x(int64_t tile) const { return tile % columns_ * kWinogradTile; }

  ConvolutionShape shape_;
  int64_t rows_, columns_;
};

// A weight [K, 3, 3, C] by panels of output channels. Turned, it is the weight of the convolution
// that takes the output's gradient to the input's: rotated by half a turn, input and output
// channels exchanged.
//
// Packed, a small one is transformed: [36 points][input channels][columns] in each panel. A large
// one is only transposed, [9 taps][input channels][columns], and transformed piece by piece at
// every use: reading four times as much from memory costs more.
class Weight {
 public:
  // Input channels transformed at a time: few enough for a core's cache.
  static constexpr int64_t kRows = kernels::kPanel;
  // Floats transform() needs to work in.
  static constexpr int64_t kWorkspace = 9 * kRows * kernels::kPanel;

  // Of the convolution whose shape is given; from a weight, or what pack() made of it.
  Weight(const ConvolutionShape& shape, const float* weight, const float* packed,
         bool turned = false)
      : rows_(shape.channels),
        columns_(shape.out_channels),
        weight_(weight),
        packed_(packed),
        turned_(turned) {}

  bool large() const { return kWinogradPoints * rows_ * columns_ > (1 << 20); }
  bool packed() const { return packed_ != nullptr; }
  int64_t panels() const { return divide_up(columns_, kernels::kPanel); }
  Panel panel(int64_t index) const { return Panel(index, columns_); }

  int64_t packed_size() const { return offset(panels()); }
  void pack(float* packed) const;

  // The points of a panel of a small weight, packed, and the distance between them.
  const float* points(const Panel& panel) const { return packed_ + offset(panel.index); }
  int64_t stride(const Panel& panel) const {
    return large() ? rows_ * panel.width : point_stride(rows_, panel.width);
  }
  // The points of up to kRows input channels in a panel, not of a small packed weight.
  void transform(const Panel& panel, int64_t row, int64_t rows, float* points, int64_t point,
                 float* workspace) const;
  // What transform() will read of a large packed weight; nothing of others, which lie elsewhere.
  kernels::Ahead ahead(const Panel& panel, int64_t row, int64_t rows) const;

 private:
  void transpose(const Panel& panel, int64_t row, int64_t rows, float* taps, int64_t tap) const;
  int64_t offset(int64_t panel) const;

  int64_t rows_, columns_;
  const float* weight_;
  const float* packed_;
  bool turned_;
};

// output = epilogue(the convolution of input with weight).
template <class T>
void forward(const ConvolutionShape& shape, const T* input, const Weight& weight, T* output,
             const kernels::EpilogueOf<T>& epilogue, BlockMoments* moments);

void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass);

}  // namespace torchweld::ops::winograd
