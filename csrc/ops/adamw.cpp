#include "ops/adamw.h"

#include <algorithm>

#include "kernels/adamw.h"
#include "ops/check.h"

namespace torchweld::ops {
namespace {

// Whether two indices share memory, as in an expanded tensor: there is no telling which is to win.
bool overlaps(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && strides[i] == 0) return true;
  }
  return false;
}

}  // namespace

std::optional<RealType> real_type(ScalarType type) {
  if (type == ScalarType::ComplexFloat) return RealType{kernels::DType::float32, 2};
  if (type == ScalarType::ComplexDouble) return RealType{kernels::DType::float64, 2};
  const auto dtype = to_dtype(type);
  if (!dtype) return std::nullopt;
  return RealType{*dtype, 1};
}

bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> dims;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1) dims.push_back(i);
  }
  std::sort(dims.begin(), dims.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t i : dims) {
    if (strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), others = b.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    // The stride of a dimension of size 1 is never used.
    if (sizes[i] > 1 && strides[i] != others[i]) return false;
  }
  return true;
}

void check_like_param(const char* op, const char* argument, const Tensor& tensor,
                      const Tensor& param, ScalarType dtype, size_t k, bool written) {
  TORCHWELD_CHECK(tensor.device() == param.device(), op, argument,
                  "tensors on the device of params[" << k << "]", "one elsewhere");
  TORCHWELD_CHECK(tensor.scalar_type() == dtype, op, argument,
                  dtype_name(dtype)
                      << " beside params[" << k << "] of " << dtype_name(param.scalar_type()),
                  dtype_name(tensor.scalar_type()));
  TORCHWELD_CHECK(same_shape(tensor, param), op, argument,
                  "the shape " << shape_string(param) << " of params[" << k << "]",
                  shape_string(tensor));
  TORCHWELD_CHECK(!written || !overlaps(tensor), op, argument, "memory without overlap",
                  "an expanded tensor at " << k);
}

void check_grad_norm(const char* op, const TensorList& grads) {
  for (const Tensor& grad : grads) {
    TORCHWELD_CHECK(real_type(grad.scalar_type()), op, "grads", kAdamWDTypes,
                    dtype_name(grad.scalar_type()));
    TORCHWELD_CHECK(grad.device() == grads[0].device(), op, "grads", "tensors on one device",
                    "another");
  }
}

void check_scalar(const char* op, const char* argument, const Tensor& tensor, const Tensor& param,
                  std::optional<ScalarType> dtype) {
  const ScalarType type = tensor.scalar_type();
  const bool fits =
      dtype ? type == *dtype : type == ScalarType::Double || type == ScalarType::Float;
  TORCHWELD_CHECK(fits && tensor.numel() == 1 && tensor.device() == param.device(), op, argument,
                  "a " << (dtype ? dtype_name(*dtype) : "float64 or float32")
                       << " scalar on the device of params",
                  dtype_name(type) << " of shape " << shape_string(tensor)
                                   << (tensor.device() == param.device() ? "" : " elsewhere"));
}

void check_blocks(const char* op, const Tensor& values, const Tensor& codes, const Tensor& scales) {
  const int64_t size = values.numel();
  TORCHWELD_CHECK(codes.device() == values.device() && scales.device() == values.device(), op,
                  "values", "tensors on one device", "several");
  TORCHWELD_CHECK(values.scalar_type() == ScalarType::Float && is_dense(values), op, "values",
                  "float32 without gaps", dtype_name(values.scalar_type()));
  TORCHWELD_CHECK(codes.scalar_type() == ScalarType::Byte && codes.numel() == size &&
                      codes.dim() == values.dim() && same_layout(codes, values),
                  op, "codes", "uint8 that lies as values",
                  dtype_name(codes.scalar_type()) << " of shape " << shape_string(codes));
  TORCHWELD_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() &&
                      scales.numel() == (size + kernels::kAdamWBlock - 1) / kernels::kAdamWBlock,
                  op, "scales", "float32, one per " << kernels::kAdamWBlock << " values",
                  shape_string(scales));
}

}  // namespace torchweld::ops
