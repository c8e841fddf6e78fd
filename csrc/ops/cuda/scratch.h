// Memory of an operator's own.
#pragma once

#include "ops/torch_compat.h"

namespace torchweld::ops {

// Memory on the device of a tensor, in parts.
class CudaScratch {
 public:
  // Room for `count` of T; a place in what allocate() will make.
  template <class T>
  int64_t reserve(int64_t count) {
    const int64_t place = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return place;
  }

  // torch's allocator gives it back to whoever works next on the same stream, so it may be freed
  // before the device is done.
  void allocate(const Tensor& on_device_of) {
    memory_ = torch::stable::new_empty(on_device_of, IntList{bytes_ + 1}, ScalarType::Byte);
  }

  template <class T>
  T* at(int64_t place) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->mutable_data_ptr()) + place);
  }

 private:
  int64_t bytes_ = 0;
  std::optional<Tensor> memory_;
};

}  // namespace torchweld::ops
