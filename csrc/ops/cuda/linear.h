// What the linear layers on CUDA share.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "kernels/cuda/linear_end.h"
#include "ops/check.h"
#include "ops/linear.h"

namespace torchweld::ops {

inline std::string device_name(const Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "the CPU";
}

// One argument on CUDA is enough for a call to come here. Throws unless the packed weight is there
// and the others, where they are given, are with it.
inline void check_devices(
    const char* op, const Tensor& packed_weight,
    std::initializer_list<std::pair<const char*, std::optional<Tensor>>> others) {
  TORCHWELD_CHECK(packed_weight.is_cuda(), op, "packed_weight",
                  "a tensor on CUDA, as another argument is",
                  "one on " << device_name(packed_weight));
  for (const auto& [argument, tensor] : others) {
    TORCHWELD_CHECK(!tensor || tensor->device() == packed_weight.device(), op, argument,
                    "a tensor on " << device_name(packed_weight) << ", as packed_weight is",
                    "one on " << device_name(*tensor));
  }
}

// `tensor`, which is contiguous, or a copy at an address the kernels can read 16 bytes at.
inline Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// Bytes of quantized rows, or of split gradients, made at a time: bounds the scratch memory of a
// call.
inline constexpr int64_t kScratchBytes = 128 << 20;
inline constexpr int64_t kChunkRows = 128;  // whole tiles

inline int64_t rows_at_a_time(int64_t rows, int64_t row_bytes) {
  const int64_t fit = kScratchBytes / std::max<int64_t>(row_bytes, 1) / kChunkRows * kChunkRows;
  return std::min(rows, std::max(fit, kChunkRows));
}

// Rows of the input, and where a chunk of them begins.
struct Input {
  explicit Input(const Tensor& tensor)
      : rows(tensor), dtype(*to_dtype(tensor.scalar_type())), element(tensor.element_size()) {}

  const void* at(int64_t row) const {
    return static_cast<const char*>(rows.tensor.const_data_ptr()) + row * rows.stride * element;
  }

  Rows rows;
  kernels::DType dtype;
  int64_t element;
};

// The end of a product on CUDA, where a bias is read in its own dtype.
class CudaLinearTail {
 public:
  // Throws as LinearTail does.
  CudaLinearTail(const char* op, Tensor& output, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual, const std::string& activation)
      : tail_(op, output, std::nullopt, residual, activation), end_{} {
    end_.output_dtype = *to_dtype(output.scalar_type());
    if (!bias) return;
    check_bias(op, *bias, output.size(output.dim() - 1));
    bias_ = torch::stable::contiguous(*bias);
    end_.bias = bias_->const_data_ptr();
    end_.bias_dtype = *to_dtype(bias_->scalar_type());
  }

  // From this row on; the scales are null.
  kernels::cuda::LinearEnd at(int64_t row) const {
    kernels::cuda::LinearEnd result = end_;
    result.of = tail_.at(row, 0);
    return result;
  }

 private:
  LinearTail tail_;
  std::optional<Tensor> bias_;
  kernels::cuda::LinearEnd end_;
};

}  // namespace torchweld::ops
