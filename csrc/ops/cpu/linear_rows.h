// The input of linear layers, as the kernels want it.
#pragma once

#include <optional>

#include "ops/cpu/scratch.h"
#include "ops/divide.h"
#include "ops/kernels.h"
#include "ops/linear.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// Bytes from one quantized row to the next: whole cache lines, and not a multiple of 4096, which
// would map all rows to the same lines of the first cache.
constexpr int64_t quantized_stride(int64_t in_features) {
  const int64_t stride = round_up(in_features, 64) + 64;
  return stride % 4096 == 0 ? stride + 64 : stride;
}

// The same as float32, and no stride that would map all rows to the same lines of the first cache.
class FloatRows {
 public:
  FloatRows(const Tensor& source, int64_t rows, int64_t columns) : rows_(source) {
    constexpr int64_t kAlias = 1024 / sizeof(float);
    if (source.scalar_type() == ScalarType::Float && (rows < 4 || rows_.stride % kAlias != 0)) {
      data_ = rows_.tensor.const_data_ptr<float>();
      stride_ = rows_.stride;
      return;
    }
    stride_ = columns + (columns % kAlias == 0 ? 16 : 0);
    const auto widen =
        cpu_kernels().dequantize->widen[static_cast<size_t>(*to_dtype(source.scalar_type()))];
    const char* from = static_cast<const char*>(rows_.tensor.const_data_ptr());
    const int64_t row_bytes = rows_.stride * static_cast<int64_t>(source.element_size());
    float* to = copy_.emplace(rows * stride_).data();
    parallel_for(rows, (1 << 15) / (columns + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) widen(from + i * row_bytes, columns, to + i * stride_);
    });
    data_ = to;
  }
  const float* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  Rows rows_;
  std::optional<Scratch> copy_;
  const float* data_;
  int64_t stride_;
};

}  // namespace torchweld::ops
