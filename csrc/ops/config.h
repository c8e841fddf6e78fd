// The process-wide switches, as the operators read them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "torchweld/config.h"

namespace torchweld::ops {

enum class Algorithm { automatic, aten, dense, winograd, depthwise };
inline constexpr std::size_t kAlgorithmCount = 5;

struct Config {
  std::atomic<bool> winograd;
  std::atomic<Algorithm> convolution;
  std::atomic<int64_t> memory_pool;
};

// Throws std::runtime_error when an environment variable holds what it cannot mean.
Config& config();

}  // namespace torchweld::ops
