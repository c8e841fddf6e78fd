// Convolution with one channel to a group, a row of pixels at a time.
//
// Forward and the gradient for the input are the same kernel: what differs is which taps meet which
// pixels, and that is in the strides. With stride 2 the gradient's even and odd pixels have taps of
// their own; each is a row of every second pixel.
#pragma once

#include <cstdint>

#include "kernels/gemm.h"

namespace torchweld::kernels {

// Channels of a block of packed weights: [channels rounded up / 16][taps][16], zeros at the end.
// The same bytes for every instruction set.
inline constexpr int64_t kDepthwiseGroup = 16;

// What the taps of one kernel row, or several, meet in the rows of an image. Tap s of output pixel
// q lies on input pixel first + q * step + s * tap_step; outside [0, width) it counts as nothing.
struct DepthwiseTaps {
  const float* const* input;  // one pointer per row of taps: that input row's pixel 0
  int64_t rows;
  int64_t taps;   // of a row
  int64_t width;  // pixels of an input row
  int64_t first;
  int64_t step;
  int64_t tap_step;
  int64_t channels;
};

// Memory that will be wanted soon, fetched to the second cache level a little with every tile: the
// hardware prefetches within a page, and a row of pixels is several.
struct DepthwiseAhead {
  const float* data;
  int64_t size;  // floats
};

// output[q * output_step + c] = epilogue(sum over rows r, taps s of weight * input), each a chain
// of fused multiply-adds in that order: the same bits on every instruction set.
struct DepthwiseForward {
  DepthwiseTaps taps;
  const float* const* weight;  // one pointer per row of taps: [taps][16] of the first 16 channels
  int64_t weight_group;        // floats to the next 16 channels
  float* output;
  int64_t output_width;
  int64_t output_step;
  Epilogue epilogue;  // its residual is laid out as the output
  DepthwiseAhead input_ahead;
  DepthwiseAhead output_ahead;
};

// sums[c / 16][r][s][c % 16] += sum over pixels q of grad[q * channels + c] * input: the gradient of
// the weight, from one row of output pixels.
struct DepthwiseWeightGradient {
  DepthwiseTaps taps;
  const float* grad;
  int64_t grad_width;
  float* sums;
  int64_t sums_group;  // floats from a group of 16 channels to the next
  DepthwiseAhead input_ahead;
};

struct DepthwiseKernels {
  void (*forward)(const DepthwiseForward& arguments);
  void (*weight_gradient)(const DepthwiseWeightGradient& arguments);
  // totals[i] += sums[i], then sums[i] = 0. `size` is a multiple of 16.
  void (*flush)(float* sums, double* totals, int64_t size);
};

}  // namespace torchweld::kernels
