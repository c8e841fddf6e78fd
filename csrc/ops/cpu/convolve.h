// The convolution inside a fused operator: by an algorithm of ours where the rule of choose.h says
// so, else ATen's.
#pragma once

#include "ops/cpu/normalize.h"

namespace torchweld::ops {

// The convolution's output, dense. Also its statistics, if `moments` is not null.
Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const Convolution& conv, Moments* moments);

// activation(convolution + residual). `packed_weight` is what pack_weight() gave, if that fits the
// algorithm chosen for this input; it only saves time.
Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& packed_weight,
                const OptionalTensor& bias, const OptionalTensor& residual, const Convolution& conv,
                kernels::Activation activation, double negative_slope);

// The weight as the algorithm for these arguments wants it, or an empty tensor if it is ATen's.
Tensor pack_weight(const Tensor& weight, const Convolution& conv);

// Gradients for input and weight (undefined where not asked for), given the gradient through the
// normalization.
std::tuple<Tensor, Tensor> convolve_backward(const Normalization::Gradient& gradient,
                                             const Tensor& input, const Tensor& weight,
                                             const Convolution& conv, bool input_grad,
                                             bool weight_grad);

}  // namespace torchweld::ops
