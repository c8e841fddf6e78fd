// Which algorithm a convolution of float32 channels_last tensors runs with.
#pragma once

#include "ops/cpu/convolution.h"

namespace torchweld::ops {

// The algorithm expected to be fastest (rule.h), or the one torchweld::convolution_algorithm()
// names where it can; null where that is ATen's. A "folded" convolution is one whose weight may
// come packed, with bias and activation in place of batch statistics.
const ConvolutionAlgorithm* choose_forward(const ConvolutionShape& shape);
// With a weight packed for another algorithm of ours than the rule's, that one: packing again would
// cost more than it gains. `packed_size` is 0 without a packed weight.
const ConvolutionAlgorithm* choose_folded(const ConvolutionShape& shape, int64_t packed_size);
const ConvolutionAlgorithm* choose_backward(const ConvolutionShape& shape, bool input_grad,
                                            bool weight_grad);

}  // namespace torchweld::ops
