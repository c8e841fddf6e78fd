#include "ops/linear.h"

#include <functional>
#include <numeric>

#include "ops/check.h"

namespace torchweld::ops {
namespace {

kernels::LinearActivation parse_activation(const char* op, const std::string& name) {
  using kernels::LinearActivation;
  if (name == "identity") return LinearActivation::identity;
  if (name == "relu") return LinearActivation::relu;
  if (name == "gelu") return LinearActivation::gelu;
  if (name == "gelu_tanh") return LinearActivation::gelu_tanh;
  TORCHWELD_CHECK(name == "silu", op, "activation", "identity, relu, gelu, gelu_tanh or silu",
                  '"' << name << '"');
  return LinearActivation::silu;
}

// Asks torch only for what changes something: each question costs as much as a small product.
Tensor in_order(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor contiguous_float(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Float) return in_order(tensor);
  return in_order(torch::stable::to(tensor, ScalarType::Float));
}

}  // namespace

LinearTail::LinearTail(const char* op, Tensor& output, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, const std::string& activation)
    : bias_(bias), residual_(residual), first_{} {
  const int64_t columns = output.size(output.dim() - 1);
  first_.activation = parse_activation(op, activation);
  first_.output = output.mutable_data_ptr();
  first_.output_stride = columns;
  element_ = residual_element_ = output.element_size();
  if (bias) {
    check_bias(op, *bias, columns);
    bias_ = contiguous_float(*bias);
    first_.bias = bias_->const_data_ptr<float>();
  }
  if (residual) {
    TORCHWELD_CHECK(to_dtype(residual->scalar_type()) && same_shape(*residual, output), op,
                    "residual", "floating point " << shape_string(output), describe(*residual));
    first_.residual_is_float = residual->scalar_type() != output.scalar_type();
    residual_ = first_.residual_is_float ? contiguous_float(*residual) : in_order(*residual);
    residual_element_ = residual_->element_size();
    first_.residual = residual_->const_data_ptr();
    first_.residual_stride = columns;
  }
}

kernels::LinearEpilogue LinearTail::at(int64_t row, int64_t column) const {
  kernels::LinearEpilogue result = first_;
  const int64_t offset = row * first_.output_stride + column;
  result.output = static_cast<char*>(first_.output) + offset * element_;
  if (first_.bias) result.bias = first_.bias + column;
  if (first_.residual) {
    result.residual = static_cast<const char*>(first_.residual) + offset * residual_element_;
  }
  return result;
}

int64_t check_matrix(const char* op, const char* argument, const Tensor& matrix, int64_t columns) {
  const auto dtype = to_dtype(matrix.scalar_type());
  TORCHWELD_CHECK(dtype && *dtype != kernels::DType::float64, op, argument,
                  "float32, bfloat16 or float16", dtype_name(matrix.scalar_type()));
  const auto sizes = matrix.sizes();
  TORCHWELD_CHECK(!sizes.empty() && sizes.back() == columns, op, argument,
                  "[..., " << columns << "]", shape_string(matrix));
  return std::accumulate(sizes.begin(), sizes.end() - 1, int64_t{1}, std::multiplies<>());
}

void check_bias(const char* op, const Tensor& bias, int64_t columns) {
  TORCHWELD_CHECK(to_dtype(bias.scalar_type()) && bias.dim() == 1 && bias.size(0) == columns, op,
                  "bias", "floating point [" << columns << "]", describe(bias));
}

IntList with_last_size(const Tensor& tensor, int64_t size) {
  const auto old = tensor.sizes();
  IntList sizes(old.begin(), old.end());
  sizes.back() = size;
  return sizes;
}

Rows::Rows(const Tensor& source) : tensor(source), stride(source.size(source.dim() - 1)) {
  if (tensor.is_contiguous()) return;
  if (tensor.dim() == 2 && tensor.stride(1) == 1) {
    stride = tensor.stride(0);
  } else {
    tensor = torch::stable::contiguous(tensor);
  }
}

}  // namespace torchweld::ops
