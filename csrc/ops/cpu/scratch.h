// Memory an operator needs while it runs.
#pragma once

#include "ops/memory.h"

namespace torchweld::ops {

// Uninitialized floats, from the pool where there are many of them: to touch fresh pages for the
// first time takes longer than most of what is computed in them.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : tensor_(empty({1, 1, 1, floats}, ScalarType::Float,
                      torch::headeronly::MemoryFormat::Contiguous)) {}

  float* data() const { return tensor_.mutable_data_ptr<float>(); }

 private:
  Tensor tensor_;
};

}  // namespace torchweld::ops
