// Memory an operator needs while it runs.
#pragma once

#include <algorithm>

#include "ops/memory.h"

namespace torchweld::ops {

// Uninitialized floats, from the pool where there are many of them: to touch fresh pages for the
// first time takes longer than most of what is computed in them.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : tensor_(empty({1, 1, 1, floats < kLeast ? floats : std::max(floats, kPooled)},
                      ScalarType::Float, torch::headeronly::MemoryFormat::Contiguous)) {}

  float* data() const { return tensor_.mutable_data_ptr<float>(); }

 private:
  // Anything that fills a good part of a core's second cache lies in huge pages: small ones are
  // strewn over memory, and those that fall on the same sets of the cache drive each other out.
  static constexpr int64_t kLeast = 1 << 15;
  static constexpr int64_t kPooled = kSmallestPooled / 4;

  Tensor tensor_;
};

}  // namespace torchweld::ops
