// What every operator on CUDA begins with.
#pragma once

#include <cuda_runtime_api.h>

#include "ops/torch_compat.h"

namespace torchweld::ops {

// Makes a tensor's device the current one while it lives, and knows the stream torch works on
// there.
class CudaContext {
 public:
  // Throws if the tensor is elsewhere, or the driver too old for this build. `op`: for messages.
  CudaContext(const char* op, const Tensor& tensor);

  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const;

  // The graph being captured on the stream, told from any other one; 0 if there is none.
  unsigned long long capture() const;

  // Throws what an error of CUDA means.
  void check(cudaError_t error) const;

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  int device_;
  cudaStream_t stream_;
};

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
