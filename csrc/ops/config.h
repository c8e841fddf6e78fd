// The process-wide switches, as the operators read them.
#pragma once

#include <atomic>
#include <cstdint>

#include "ops/algorithm.h"
#include "torchweld/config.h"

namespace torchweld::ops {

struct Config {
  std::atomic<bool> winograd;
  std::atomic<Algorithm> convolution;
  std::atomic<int64_t> memory_pool;
};

// Throws std::runtime_error when an environment variable holds what it cannot mean.
Config& config();

}  // namespace torchweld::ops
