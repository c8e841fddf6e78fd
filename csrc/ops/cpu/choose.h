// Which algorithm a convolution of float32 channels_last tensors runs with.
#pragma once

#include "ops/cpu/convolution.h"

namespace torchweld::ops {

// The algorithm expected to be fastest, or the one torchweld::convolution_algorithm() names where
// it can; null where that is ATen's. `prepacked`: the weight comes packed, so packing costs
// nothing.
const ConvolutionAlgorithm* choose_forward(const ConvolutionShape& shape, bool prepacked);
const ConvolutionAlgorithm* choose_backward(const ConvolutionShape& shape, bool input_grad,
                                            bool weight_grad);

}  // namespace torchweld::ops
