// The single door to torch. Everything in ops/ reaches torch through the LibTorch Stable ABI, so
// one binary loads in every torch release from the target on.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/dtype.h"

namespace torchweld::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using IntList = std::vector<int64_t>;
using TensorList = std::vector<Tensor>;

// A string argument of an operator: torch's conversion to std::string leaks one with every call, in
// the headers of the floor at least (https://github.com/pytorch/pytorch/pull/190493).
struct String : std::string {
  using std::string::string;
};

// The tensors of a list argument: owned, but without the counter that each stable::Tensor
// allocates, which matters where there are a thousand.
class Handles {
 public:
  Handles() = default;
  Handles(Handles&& other) noexcept : handles_(std::exchange(other.handles_, {})) {}
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  void reserve(size_t size) { handles_.reserve(size); }
  void take(AtenTensorHandle handle) { handles_.push_back(handle); }
  const std::vector<AtenTensorHandle>& get() const { return handles_; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// The tensor behind a handle, which keeps its own owner.
inline Tensor another_owner(AtenTensorHandle handle) {
  AtenTensorHandle shared;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &shared));
  return Tensor(shared);
}

// Turns autograd recording off for the calls into ATen an operator makes. Below Python's autograd
// it is off already; a C++ program that calls the operator directly has it on.
class NoGradGuard {
 public:
  NoGradGuard() : previous_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGradGuard() { aoti_torch_grad_mode_set_enabled(previous_); }
  NoGradGuard(const NoGradGuard&) = delete;
  NoGradGuard& operator=(const NoGradGuard&) = delete;

 private:
  bool previous_;
};

inline std::optional<kernels::DType> to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kernels::DType::float32;
    case ScalarType::Double:
      return kernels::DType::float64;
    case ScalarType::BFloat16:
      return kernels::DType::bfloat16;
    case ScalarType::Half:
      return kernels::DType::float16;
    default:
      return std::nullopt;
  }
}

}  // namespace torchweld::ops

template <>
struct torch::stable::detail::ToImpl<torchweld::ops::String> {
  static torchweld::ops::String call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    torchweld::ops::String result(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};

template <>
struct torch::stable::detail::ToImpl<torchweld::ops::Handles> {
  static torchweld::ops::Handles call(StableIValue value, uint64_t, bool) {
    const auto list = torch::stable::detail::to<StableListHandle>(value);
    const std::unique_ptr<StableListOpaque, void (*)(StableListHandle)> owner(
        list, [](StableListHandle owned) { torch_delete_list(owned); });
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    torchweld::ops::Handles result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      result.take(torch::stable::detail::to<AtenTensorHandle>(item));
    }
    return result;
  }
};
