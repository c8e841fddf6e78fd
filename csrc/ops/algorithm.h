// What torchweld::convolution_algorithm() may name; as a number, what the operator
// torchweld::_convolution_algorithm() returns.
#pragma once

#include <cstddef>

namespace torchweld::ops {

enum class Algorithm { automatic, aten, dense, winograd, depthwise, cudnn };
inline constexpr std::size_t kAlgorithmCount = 6;

}  // namespace torchweld::ops
