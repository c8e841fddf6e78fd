// What every back end of the conv_bn_relu ops checks and derives before it touches memory.
#pragma once

#include <string>

#include "kernels/conv_bn_relu.h"
#include "ops/aten.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

using OptionalTensor = std::optional<Tensor>;

// The enum for one of "identity", "relu", "relu6", "leaky_relu", "silu", "hardswish"; throws on
// another name.
kernels::Activation to_activation(const char* op, const std::string& name);

// Shape of the convolution's output. Throws unless ATen's convolution would take these arguments.
IntList check_convolution(const char* op, const Tensor& input, const Tensor& weight,
                          const OptionalTensor& bias, const Convolution& conv);

// Throws unless the weight and the arguments can be those of a convolution.
void check_weight(const char* op, const Tensor& weight, const Convolution& conv);

// Throws unless x is a 4-D tensor of a supported dtype on the CPU.
void check_activations(const char* op, const char* argument, const Tensor& x);

// Throws unless the tensor, if there is one, has this shape and the dtype of `like`.
void check_same(const char* op, const char* argument, const OptionalTensor& tensor,
                const IntList& shape, const Tensor& like);

// Throws unless the tensor, if there is one, has `channels` elements of a dtype batch norm mixes
// with `like`: its own, or float32 beside a 16-bit one.
void check_channels(const char* op, const char* argument, const OptionalTensor& tensor,
                    int64_t channels, const Tensor& like);

// Throws unless the tensor holds `size` float64.
void check_doubles(const char* op, const char* argument, const Tensor& tensor, int64_t size);

}  // namespace torchweld::ops
