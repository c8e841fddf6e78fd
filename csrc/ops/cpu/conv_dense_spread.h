// The input gradient where the input has few channels.
//
// As a convolution of the output's gradient it would compute few columns: most of a register would
// be empty. Here pixels are the columns and all taps and channels of the kernel the rows of a
// product, whose rows are then added where their taps lie (the col2im of unrolled convolutions, a
// few pixels at a time).
#pragma once

#include "ops/cpu/conv_dense.h"
#include "ops/cpu/scratch.h"

namespace torchweld::ops::dense {

// Whether the gradient is to be spread, rather than gathered by a convolution.
inline bool is_spread(const ConvolutionShape& shape) {
  return shape.channels < 8 && shape.kernel_height * shape.kernel_width > 1;
}

// What one thread needs to spread the gradients of images. The rows of an image that blocks still
// add to lie in a ring, each as a plane for every channel and every phase of a stride.
class Spread {
 public:
  Spread(const Plan& plan, const float* weight);

  // Adds the part of a block, whose pixels' gradients are given. An image's blocks come in order;
  // a row of grad_input, the image's, is written when the last of them has reached it.
  void add(const Block& block, const float* gradient, float* grad_input);

 private:
  void multiply(const float* gradient, int64_t pixels);
  void add_row(int64_t row, int64_t run, int64_t column, int64_t pixels);
  void finish_rows(int64_t end, float* grad_input);

  float* row(int64_t row);
  // Pixels a tap lies beyond its output pixel's first, of a plane.
  int64_t offset(int64_t tap) const {
    const ConvolutionShape& s = plan_.shape();
    return tap * s.dilation_width / s.stride_width;
  }

  const Plan& plan_;
  const float* weight_;
  int64_t plane_;         // floats of a plane
  int64_t margin_;        // zeros before and after a row of products
  int64_t width_;         // floats of a row of products
  int64_t slots_;         // rows of the ring, row h in slot h % slots_
  int64_t finished_ = 0;  // rows of the image
  int64_t filled_ = 0;    // pixels of the products
  Scratch rows_;          // the ring, and a row for what lies above and below the image
  Scratch columns_;       // gradients [channels][pixels]
  Scratch products_;      // [taps and channels][pixels]
  std::vector<const float*> sources_;
};

}  // namespace torchweld::ops::dense
