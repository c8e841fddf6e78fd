#include "ops/adamw.h"

#include <algorithm>

#include "ops/check.h"

namespace torchweld::ops {
namespace {

constexpr const char* kDTypes = "float32, float64, bfloat16, float16, complex64 or complex128";

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

// Whether two indices share memory, as in an expanded tensor: there is no telling which is to win.
bool overlaps(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > 1 && strides[i] == 0) return true;
  }
  return false;
}

void check_list(const TensorList& params, const TensorList& list, const char* argument,
                bool written) {
  TORCHWELD_CHECK(list.size() == params.size(), "adamw_step_", argument,
                  params.size() << " tensors, one per param", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    TORCHWELD_CHECK(list[i].scalar_type() == params[i].scalar_type(), "adamw_step_", argument,
                    dtype_name(params[i].scalar_type()) << " as params[" << i << "]",
                    dtype_name(list[i].scalar_type()));
    TORCHWELD_CHECK(same_shape(list[i], params[i]), "adamw_step_", argument,
                    "the shape " << shape_string(params[i]) << " of params[" << i << "]",
                    shape_string(list[i]));
    TORCHWELD_CHECK(!written || !overlaps(list[i]), "adamw_step_", argument,
                    "memory without overlap", "an expanded tensor at " << i);
  }
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

void check_adamw_step(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                      const TensorList& state_steps, bool amsgrad) {
  for (const Tensor& param : params) {
    TORCHWELD_CHECK(real_type(param.scalar_type()), "adamw_step_", "params", kDTypes,
                    dtype_name(param.scalar_type()));
  }
  check_list(params, params, "params", true);
  check_list(params, grads, "grads", false);
  check_list(params, exp_avgs, "exp_avgs", true);
  check_list(params, exp_avg_sqs, "exp_avg_sqs", true);
  if (amsgrad) {
    check_list(params, max_exp_avg_sqs, "max_exp_avg_sqs", true);
  } else {
    TORCHWELD_CHECK(max_exp_avg_sqs.empty(), "adamw_step_", "max_exp_avg_sqs",
                    "an empty list without amsgrad", max_exp_avg_sqs.size() << " tensors");
  }
  TORCHWELD_CHECK(state_steps.size() == params.size(), "adamw_step_", "state_steps",
                  params.size() << " tensors, one per param", state_steps.size());
  for (const Tensor& step : state_steps) {
    TORCHWELD_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Float, "adamw_step_",
                    "state_steps", "float32 scalars",
                    dtype_name(step.scalar_type()) << " of shape " << shape_string(step));
  }
}

void check_grad_norm(const TensorList& grads) {
  for (const Tensor& grad : grads) {
    TORCHWELD_CHECK(real_type(grad.scalar_type()), "grad_norm", "grads", kDTypes,
                    dtype_name(grad.scalar_type()));
  }
}

}  // namespace torchweld::ops
