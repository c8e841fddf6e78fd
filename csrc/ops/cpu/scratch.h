// Memory an operator needs while it runs.
#pragma once

#include <algorithm>
#include <new>
#include <optional>

#include "ops/memory.h"

namespace torchweld::ops {

// Uninitialized floats, from the pool where there are many of them: to touch fresh pages for the
// first time takes longer than most of what is computed in them.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats <= kFew) {
      data_ = few_;
      return;
    }
    if (floats < kLeast) {  // a tensor would cost more than to fill it
      data_ = static_cast<float*>(::operator new(static_cast<size_t>(floats) * 4, kAlign));
      return;
    }
    tensor_ = empty({1, 1, 1, std::max(floats, kPooled)}, ScalarType::Float,
                    torch::headeronly::MemoryFormat::Contiguous);
    data_ = tensor_->mutable_data_ptr<float>();
  }
  ~Scratch() {
    if (!tensor_ && data_ != few_) ::operator delete(data_, kAlign);
  }
  Scratch(const Scratch&) = delete;  // a few floats lie in the object itself

  float* data() const { return data_; }

 private:
  // Anything that fills a good part of a core's second cache lies in huge pages: small ones are
  // strewn over memory, and those that fall on the same sets of the cache drive each other out.
  static constexpr int64_t kLeast = 1 << 15;
  static constexpr int64_t kPooled = kSmallestPooled / 4;
  // Rows of a small layer: to allocate these would cost as much as its product.
  static constexpr int64_t kFew = 512;
  static constexpr std::align_val_t kAlign{64};

  std::optional<Tensor> tensor_;
  float* data_;
  alignas(64) float few_[kFew];
};

}  // namespace torchweld::ops
