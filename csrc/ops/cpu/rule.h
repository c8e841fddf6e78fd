// Where an algorithm of ours is expected to beat ATen's, and Winograd to beat dense too.
// `lanes` are the floats of a register. Written by benchmarks/fit_rule.py.
#pragma once

#include "ops/cpu/convolution.h"

namespace torchweld::ops::rule {

inline bool dense_forward(const ConvolutionShape& s, int64_t, int64_t) { return s.kernel_width < 2 || s.channels < 16; }
inline bool winograd_forward(const ConvolutionShape& s, int64_t, int64_t) { return s.channels >= 16 && s.out_channels >= 16; }
inline bool depthwise_forward(const ConvolutionShape&, int64_t, int64_t) { return true; }
inline bool dense_backward(const ConvolutionShape& s, int64_t, int64_t) { return s.kernel_width < 2 || s.channels < 16; }
inline bool winograd_backward(const ConvolutionShape& s, int64_t, int64_t) { return s.channels >= 16 && s.out_channels >= 16; }
inline bool depthwise_backward(const ConvolutionShape&, int64_t, int64_t) { return true; }
inline bool dense_folded(const ConvolutionShape&, int64_t, int64_t) { return true; }
inline bool winograd_folded(const ConvolutionShape& s, int64_t, int64_t) { return s.channels >= 16 && s.out_channels >= 16; }
inline bool depthwise_folded(const ConvolutionShape&, int64_t, int64_t) { return true; }

}  // namespace torchweld::ops::rule
