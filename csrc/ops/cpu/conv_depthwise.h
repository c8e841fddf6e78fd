// What the forward and the backward pass of depthwise_convolution() share.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/depthwise.h"
#include "ops/cpu/convolution.h"

namespace torchweld::ops::depthwise {

using kernels::DepthwiseAhead;
using kernels::DepthwiseTapsOf;
using kernels::kDepthwiseGroup;

using Shape = ConvolutionShape;

// Floats of a block's input and output rows, of which as much again is fetched ahead: a quarter of
// the second cache level, with room for the rows that the next block shares.
inline constexpr int64_t kBlockSize = 1 << 16;

inline int64_t groups(const Shape& s) {
  return (s.channels + kDepthwiseGroup - 1) / kDepthwiseGroup;
}
inline int64_t taps(const Shape& s) { return s.kernel_height * s.kernel_width; }
inline int64_t input_row(const Shape& s) { return s.width * s.channels; }
inline int64_t output_row(const Shape& s) { return s.out_width * s.channels; }
inline int64_t packed_size(const Shape& s) { return groups(s) * taps(s) * kDepthwiseGroup; }

// Rows of output in a block, where each comes with `others` floats of something else.
inline int64_t rows_per_block(const Shape& s, int64_t others) {
  return std::clamp<int64_t>(kBlockSize / (output_row(s) + others), 1, s.out_height);
}

// The taps of output rows from `first` on meet these input rows.
template <class T>
class InputRows {
 public:
  InputRows(const Shape& s, const T* input, int64_t image, int64_t first, int64_t count)
      : rows_((count - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      const int64_t h = first * s.stride_height - s.padding_height + static_cast<int64_t>(i);
      const bool inside = h >= 0 && h < s.height;
      rows_[i] = inside ? input + (image * s.height + h) * input_row(s) : nullptr;
    }
  }

  DepthwiseTapsOf<T> taps(const Shape& s) const {
    return {.input = rows_.data(),
            .rows = s.kernel_height,
            .row_step = s.stride_height,
            .row_tap_step = s.dilation_height,
            .taps = s.kernel_width,
            .step = s.stride_width,
            .tap_step = s.dilation_width,
            .first = -s.padding_width,
            .width = s.width,
            .channels = s.channels};
  }

 private:
  std::vector<const T*> rows_;
};

// What output rows [first, first + count) read that the rows before them did not.
template <class T>
DepthwiseAhead input_of(const Shape& s, const T* input, int64_t image, int64_t first,
                        int64_t count) {
  const int64_t begin =
      first * s.stride_height - s.padding_height + (s.kernel_height - 1) * s.dilation_height;
  const int64_t end = s.batch * s.height;
  const int64_t from = std::clamp<int64_t>(image * s.height + begin, 0, end);
  const int64_t rows = std::min(count * s.stride_height, end - from);
  return {input + from * input_row(s), rows * input_row(s) * static_cast<int64_t>(sizeof(T))};
}

void backward(const Shape& shape, const ConvolutionBackward& pass);

}  // namespace torchweld::ops::depthwise
