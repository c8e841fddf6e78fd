// What every back end of the AdamW ops checks and derives before it touches memory.
#pragma once

#include <vector>

#include "ops/overlap.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

// A tensor as the kernels see it: a complex one is twice as many reals.
struct RealType {
  kernels::DType dtype;
  int64_t per_element;
};
std::optional<RealType> real_type(ScalarType type);

inline constexpr const char* kAdamWDTypes =
    "float32, float64, bfloat16, float16, complex64 or complex128";

// Throws unless a tensor of the list `argument` fits param k, its strides aside.
void check_like_param(const char* op, const char* argument, const Tensor& tensor,
                      const Tensor& param, ScalarType dtype, size_t k, bool written);

// Throws unless a norm can be taken over all of these.
void check_grad_norm(const char* op, const TensorList& grads);

// Throws unless a tensor is a scalar where the parameters are: `dtype`, or float64 or float32.
void check_scalar(const char* op, const char* argument, const Tensor& tensor, const Tensor& param,
                  std::optional<ScalarType> dtype = std::nullopt);

// Throws unless codes and scales are those of the 8-bit states of `values`, in blocks of
// kAdamWBlock in the order of memory.
void check_blocks(const char* op, const Tensor& values, const Tensor& codes, const Tensor& scales);

// True if the elements fill one run of memory without gaps or overlap, in whatever order.
bool is_dense(const Tensor& tensor);

// True if equal indices lie at equal offsets. The shapes are equal.
bool same_layout(const Tensor& a, const Tensor& b);

}  // namespace torchweld::ops
