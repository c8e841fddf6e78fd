// Tensors of one parameter whose elements do not lie in the same order.
#pragma once

#include <utility>
#include <vector>

#include "ops/adamw.h"

namespace torchweld::ops {

// Brings tensors to one dense layout. One that is not in it already is worked on in a copy;
// write_back() copies the results home, once.
class Aligned {
 public:
  explicit Aligned(const Tensor& layout)
      : layout_(is_dense(layout) ? layout : torch::stable::empty_like(layout)) {}

  const void* read(const Tensor& tensor) { return align(tensor).const_data_ptr(); }

  void* update(const Tensor& tensor) {
    const Tensor aligned = align(tensor);
    if (aligned.get() != tensor.get()) results_.emplace_back(tensor, aligned);
    return aligned.mutable_data_ptr();
  }

  // For who shares memory with others that were written since.
  void read_again() {
    for (auto& [tensor, copy] : results_) torch::stable::copy_(copy, tensor);
  }

  void write_back() {
    for (auto& [tensor, copy] : results_) torch::stable::copy_(tensor, copy);
    results_.clear();
  }

 private:
  Tensor align(const Tensor& tensor) {
    if (same_layout(tensor, layout_)) return tensor;
    Tensor& copy = copies_.emplace_back(empty_like(layout_, tensor));
    return torch::stable::copy_(copy, tensor);
  }

  // An uninitialized tensor that lies as `layout` does, of the dtype of `tensor`.
  static Tensor empty_like(const Tensor& layout, const Tensor& tensor) {
    int32_t dtype, device_type;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(layout.dim(), layout.sizes().data(),
                                                    layout.strides().data(), dtype, device_type,
                                                    tensor.get_device_index(), &handle));
    return Tensor(handle);
  }

  Tensor layout_;
  std::vector<Tensor> copies_;
  std::vector<std::pair<Tensor, Tensor>> results_;
};

}  // namespace torchweld::ops
