// Convolution with one channel to a group, a few rows of pixels at a time.
//
// Forward and the gradient for the input are the same kernel: what differs is which taps meet which
// pixels, and that is in the strides. With stride 2 the gradient's even and odd pixels have taps of
// their own; each is an image of every second pixel.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/gemm.h"

namespace torchweld::kernels {

// Weights are packed as [channels rounded up / 16][rows of taps][taps][16], zeros at the end: the
// same bytes for every instruction set.
inline constexpr int64_t kDepthwiseGroup = 16;

// What the taps meet. Tap (r, s) of output pixel (p, q) lies on row p * row_step + r * row_tap_step
// and on its pixel first + q * step + s * tap_step; outside [0, width) it counts as nothing.
template <class T>
struct DepthwiseTapsOf {
  const T* const* input;  // pixel 0 of each row; null for a row above or below the image
  int64_t rows;
  int64_t row_step;
  int64_t row_tap_step;
  int64_t taps;  // of a row
  int64_t step;
  int64_t tap_step;
  int64_t first;
  int64_t width;
  int64_t channels;
};
using DepthwiseTaps = DepthwiseTapsOf<float>;

// Memory that will be wanted soon, fetched a little with every tile: the hardware prefetches within
// a page, and a row of pixels is several.
struct DepthwiseAhead {
  const void* data;
  int64_t size;  // bytes
};

// output[p * output_row + q * output_step + c] = epilogue(sum over r, s of weight * input), each a
// chain of float32 fused multiply-adds in that order, rounded to T at the end: the same bits on
// every instruction set.
template <class T>
struct DepthwiseForwardOf {
  DepthwiseTapsOf<T> taps;
  const float* weight;
  T* output;
  int64_t height, width;  // of the output
  int64_t output_row;
  int64_t output_step;
  EpilogueOf<T> epilogue;  // its residual is laid out as the output
  DepthwiseAhead input_ahead, output_ahead;
  // The output goes past the caches, where every register of it is one of their lines.
  bool streamed = false;
};
using DepthwiseForward = DepthwiseForwardOf<float>;

// sums, laid out as packed weights, += sum over p, q of grad[p][q * channels + c] * input.
struct DepthwiseWeightGradient {
  DepthwiseTaps taps;
  const float* const* grad;  // rows of output pixels
  int64_t height, width;
  float* sums;
  DepthwiseAhead input_ahead;
};

struct DepthwiseKernels {
  void (*forward)(const DepthwiseForward& arguments);
  void (*forward_bf16)(const DepthwiseForwardOf<BFloat16>& arguments);
  void (*weight_gradient)(const DepthwiseWeightGradient& arguments);
  // totals[i] += sums[i], then sums[i] = 0. `size` is a multiple of 16.
  void (*flush)(float* sums, double* totals, int64_t size);
};

}  // namespace torchweld::kernels
