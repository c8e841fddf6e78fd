// Where an algorithm of ours is expected to beat ATen's, and Winograd to beat dense too.
// `lanes` are the floats of a register. Written by benchmarks/fit_rule.py.
#pragma once

#include "ops/cpu/convolution.h"

namespace torchweld::ops::rule {

// clang-format off
inline bool dense_forward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 384 && (s.kernel_width < 4 || s.channels < 12)) || (s.channels >= 384 && (s.kernel_width < 2 || s.pixels() < 96)));
}
inline bool winograd_forward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 24 && (s.channels >= 16 && s.pixels() >= 2048)) || (s.channels >= 24 && ((s.out_channels < 32 && s.channels < 192) || (s.out_channels >= 32 && s.pixels() >= 128))));
}
inline bool depthwise_forward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return true;
}
inline bool dense_backward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 128 && (s.kernel_width < 4 || s.channels < 4)) || (s.channels >= 128 && ((s.out_channels < 64 && s.kernel_width < 4) || (s.out_channels >= 64 && s.pixels() >= 2048))));
}
inline bool winograd_backward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return (s.channels >= 24 || (s.channels >= 16 && s.pixels() >= 2048));
}
inline bool depthwise_backward([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return true;
}
inline bool dense_folded([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 384 && (s.channels < 48 || s.kernel_width < 4)) || (s.channels >= 384 && (s.pixels() < 384 || s.kernel_width < 2)));
}
inline bool winograd_folded([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 32 && (s.channels >= 12 && s.pixels() >= 2048)) || (s.channels >= 32 && (s.out_channels >= 16 || s.channels < 96)));
}
inline bool depthwise_folded([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return true;
}
inline bool dense_folded_bf16([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return ((s.channels < 128 && (s.out_channels >= 8 || s.kernel_width < 6)) || (s.channels >= 128 && (s.kernel_width < 4 && s.dilation_width < 2)));
}
inline bool winograd_folded_bf16([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return (s.channels >= 32 && (s.pixels() >= 512 && s.out_channels >= 32));
}
inline bool depthwise_folded_bf16([[maybe_unused]] const ConvolutionShape& s,
    [[maybe_unused]] int64_t threads, [[maybe_unused]] int64_t lanes) {
  return true;
}
// clang-format on

}  // namespace torchweld::ops::rule
