// Max pooling of [N, C, H, W] tensors in channels_last memory, a few rows of pixels at a time.
//
// What is kept for the backward is, for each output, which tap of its window was the greatest: a
// byte. Forward and backward are the same walk. Both write each pixel of their destination once,
// from the pixels of the source that meet it: forward those under its window, backward those whose
// windows cover it.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace torchweld::kernels {

inline constexpr int64_t kMostPoolTaps = 256;

// What meets a pixel of the destination along one axis: `count` pixels of the source from `first`
// on, through the taps from `tap` on.
struct PoolRun {
  int64_t first;
  int64_t count;
  int64_t tap;
};

struct PoolAxis {
  const PoolRun* runs;  // one for each pixel of the destination
  int64_t step;         // from one pixel of a run to the next
  int64_t tap_step;
  int64_t taps, stride, padding, dilation;  // of the windows
};

template <class T>
struct MaxPool2dOf {
  PoolAxis rows, columns;
  int64_t begin, end;           // rows of the destination
  int64_t width, source_width;  // pixels
  int64_t channels;
  const T* source;  // an image
  T* destination;
};

struct MaxPool2dKernels {
  // The greatest of each window: the first of equals, the last NaN if there is one, -inf where
  // there is nothing. `positions`, unless null, gets row tap * columns.taps + column tap.
  void (*forward)(const MaxPool2dOf<float>& arguments, uint8_t* positions);
  void (*forward_bf16)(const MaxPool2dOf<BFloat16>& arguments, uint8_t* positions);
  // The sum, in float32 and in the order of the runs, of the gradients whose position is the pixel.
  void (*backward)(const MaxPool2dOf<float>& arguments, const uint8_t* positions);
  void (*backward_bf16)(const MaxPool2dOf<BFloat16>& arguments, const uint8_t* positions);
};

}  // namespace torchweld::kernels
