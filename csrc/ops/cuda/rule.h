// Which algorithm a channels_last convolution on CUDA runs with, where torchweld::config does not
// say so. Reasoned, not yet measured: `python -m benchmarks --device cuda conv_bn_relu` prints
// every layer with and without these, and benchmarks.cuda_rule says where they lose.
#pragma once

#include "kernels/cuda/depthwise.h"
#include "ops/aten.h"

namespace torchweld::ops::rule {

// Ours reads and writes every tensor once, up to 3 x 3 taps at the speed of memory and at 5 x 5
// not far from it; ATen's own kernels want contiguous memory and take a pixel a thread, cuDNN's are
// slow in all but a few shapes. Beyond 7 x 7 taps arithmetic takes the time, and nothing is known.
inline constexpr int64_t kMostDepthwiseTaps = 49;

inline bool depthwise(const kernels::cuda::DepthwiseShape& shape) {
  return int64_t{shape.rows.taps} * shape.columns.taps <= kMostDepthwiseTaps;
}

// cuDNN's convolution with bias, residual and ReLU is the kernel without them and a longer end, so
// what it saves is two trips of the output to memory. The tensor cores' kernels want rows of 16
// bytes; without them it was seen to lose (https://github.com/pytorch/pytorch/issues/68506).
inline bool cudnn(const Tensor& weight) {
  const int64_t row = weight.scalar_type() == ScalarType::Float ? 4 : 8;
  return weight.size(0) % row == 0 && weight.size(1) % row == 0;
}

}  // namespace torchweld::ops::rule
