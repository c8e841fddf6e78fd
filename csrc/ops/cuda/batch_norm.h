// Batch norm's passes on CUDA over tensors: what the operators of conv_bn_relu launch.
#pragma once

#include "kernels/cuda/batch_norm.h"
#include "ops/conv_bn_relu.h"
#include "ops/cuda/context.h"

namespace torchweld::ops::batch_norm {

using namespace kernels::cuda;
using kernels::DType;
using kernels::Layout;

inline DType dtype_of(const Tensor& tensor) { return *to_dtype(tensor.scalar_type()); }

inline BatchNormShape batch_norm_shape(const Tensor& x) {
  return {x.size(0), x.size(1), x.size(2) * x.size(3),
          x.is_contiguous() ? Layout::planes : Layout::columns, dtype_of(x)};
}

inline Tensor empty_as(const Tensor& x) {
  return torch::stable::empty(shape_of(x), x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              format_of(x));
}

inline Tensor doubles(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, IntList{size}, ScalarType::Double);
}

inline double* data_of(const Tensor& tensor) { return tensor.mutable_data_ptr<double>(); }
inline const double* const_data_of(const Tensor& tensor) { return tensor.const_data_ptr<double>(); }

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// What batch norm reads of its channels, and the memory it lies in.
class Norm {
 public:
  Norm(const char* op, const std::string& activation, double negative_slope) {
    input_.invstd.otherwise = input_.weight.otherwise = 1;
    input_.activation = to_activation(op, activation);
    input_.negative_slope = negative_slope;
  }

  Norm& statistics(const Tensor& mean, const Tensor& invstd) {
    read(mean, input_.mean);
    read(invstd, input_.invstd);
    return *this;
  }
  Norm& running(const Tensor& mean, const Tensor& var, double eps) {
    input_.of_variance = true;
    input_.eps = eps;
    return statistics(mean, var);
  }
  Norm& affine(const OptionalTensor& weight, const OptionalTensor& bias) {
    if (weight) read(*weight, input_.weight);
    if (bias) read(*bias, input_.bias);
    return *this;
  }

  const BatchNormInput& input() const { return input_; }

 private:
  void read(const Tensor& tensor, ChannelValues& to) {
    const Tensor& kept = keep_.emplace_back(torch::stable::contiguous(tensor));
    to.data = kept.const_data_ptr();
    to.dtype = dtype_of(kept);
  }

  BatchNormInput input_{};
  std::vector<Tensor> keep_;
};

struct Scratch {
  explicit Scratch(const Tensor& x) {
    const int64_t place = scratch.reserve<double>(batch_norm_scratch(batch_norm_shape(x)));
    scratch.allocate(x);
    data = scratch.at<double>(place);
  }
  CudaScratch scratch;
  double* data;
};

// y = activation(norm(x) + residual), where `statistics` finds first what norm reads of the batch,
// if it is not null.
inline void normalize(const CudaContext& context, const Tensor& x, const Norm& norm,
                      const OptionalTensor& residual, const Tensor& y,
                      const StatisticsParams* statistics = nullptr) {
  OptionalTensor dense_residual;
  if (residual) dense_residual = laid_out_as(x, *residual);
  const BatchNormReLUParams params{batch_norm_shape(x), norm.input(), x.const_data_ptr(),
                                   data_or_null(dense_residual), y.mutable_data_ptr()};
  if (statistics != nullptr && batch_norm_is_small(params.shape)) {
    context.check(launch_batch_norm_relu_train(*statistics, params, context.stream()));
    return;
  }
  if (statistics != nullptr) {
    context.check(launch_batch_norm_statistics(*statistics, context.stream()));
  }
  context.check(launch_batch_norm_relu(params, context.stream()));
}

// Sums of g and g * xhat per channel; also as gradients of parameters, where there is a tensor for
// one. The tensors must outlive the launch alone.
struct Reduction {
  Reduction(const Tensor& x, const Norm& norm, const OptionalTensor& residual, const Tensor& grad_y,
            const OptionalTensor& grad_bn_weight = std::nullopt,
            const OptionalTensor& grad_bn_bias = std::nullopt,
            const OptionalTensor& grad_bias = std::nullopt)
      : sum_g(doubles(x, x.size(1))), sum_g_xhat(doubles(x, x.size(1))), scratch(x) {
    const auto result = [](const OptionalTensor& tensor) {
      return tensor ? ChannelResult{tensor->mutable_data_ptr(), dtype_of(*tensor)}
                    : ChannelResult{};
    };
    params = {.shape = batch_norm_shape(x),
              .bn = norm.input(),
              .x = x.const_data_ptr(),
              .residual = data_or_null(residual),
              .grad_y = grad_y.const_data_ptr(),
              .scratch = scratch.data,
              .sum_g = data_of(sum_g),
              .sum_g_xhat = data_of(sum_g_xhat),
              .grad_weight = result(grad_bn_weight),
              .grad_bias = result(grad_bn_bias),
              .grad_shift = result(grad_bias)};
  }

  Tensor sum_g, sum_g_xhat;
  Scratch scratch;
  ReduceParams params;
};

}  // namespace torchweld::ops::batch_norm
