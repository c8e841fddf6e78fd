// What all linear layers share: the arguments that follow the product, and sizes.
#pragma once

#include <string>

#include "kernels/linear_epilogue.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// Bias, activation and residual of a call, as the kernels read them.
class LinearTail {
 public:
  // Throws unless bias is floating point [N], residual floating point with the shape of `output`,
  // [..., N] and contiguous, and the activation one of identity, relu, gelu, gelu_tanh, silu.
  // Copies what is not contiguous, and to float32 a bias or residual of neither dtype.
  LinearTail(const char* op, Tensor& output, std::optional<Tensor> bias,
             std::optional<Tensor> residual, const std::string& activation);

  // The epilogue of a block that begins there; its scales are null.
  kernels::LinearEpilogue at(int64_t row, int64_t column) const;

 private:
  std::optional<Tensor> bias_, residual_;  // own what `first_` points to
  kernels::LinearEpilogue first_;
  int64_t element_, residual_element_;  // bytes
};

// Rows of the argument of that name. Throws unless it is float32, bfloat16 or float16
// [..., columns].
int64_t check_matrix(const char* op, const char* argument, const Tensor& matrix, int64_t columns);

// Throws unless the bias is floating point [columns].
void check_bias(const char* op, const Tensor& bias, int64_t columns);

// The sizes of `tensor` with the last one replaced.
IntList with_last_size(const Tensor& tensor, int64_t size);

// Rows of consecutive elements at one stride, copied only where `tensor` is not that already.
struct Rows {
  explicit Rows(const Tensor& source);
  Tensor tensor;
  int64_t stride;
};

}  // namespace torchweld::ops
