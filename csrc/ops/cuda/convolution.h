// The convolution inside a fused operator on CUDA: by a kernel of ours, or cuDNN's fused one, where
// the rule says so, else ATen's.
#pragma once

#include "ops/conv_bn_relu.h"
#include "ops/cuda/context.h"

namespace torchweld::ops {

// convolution + bias, dense.
Tensor convolve(const CudaContext& context, const Tensor& input, const Tensor& weight,
                const OptionalTensor& bias, const Convolution& conv);

// activation(convolution + bias + residual) where one kernel does it all: then the output is
// written once and never read.
OptionalTensor convolve_at_once(const CudaContext& context, const Tensor& input,
                                const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const Convolution& conv,
                                kernels::Activation activation, double negative_slope);

// Gradients for input and weight; one that is not asked for is an undefined tensor.
std::tuple<Tensor, Tensor> convolve_backward(const CudaContext& context, const Tensor& grad_output,
                                             const Tensor& input, const Tensor& weight,
                                             const Convolution& conv, bool input_grad,
                                             bool weight_grad);

}  // namespace torchweld::ops
