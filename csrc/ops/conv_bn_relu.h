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

// Throws unless x is a 4-D tensor of a supported dtype.
void check_activations(const char* op, const char* argument, const Tensor& x);

// Throws unless the tensor, if there is one, has this shape and the dtype and device of `like`.
void check_same(const char* op, const char* argument, const OptionalTensor& tensor,
                const IntList& shape, const Tensor& like);

// Throws unless the tensor, if there is one, has `channels` elements on the device of `like`, of a
// dtype batch norm mixes with it: its own, or float32 beside a 16-bit one.
void check_channels(const char* op, const char* argument, const OptionalTensor& tensor,
                    int64_t channels, const Tensor& like);

// Throws unless the tensor holds `size` float64 on the device of `like`.
void check_doubles(const char* op, const char* argument, const Tensor& tensor, int64_t size,
                   const Tensor& like);

// Throws unless batch norm's arguments apart from the convolution fit the input.
struct BatchNormArguments {
  const Tensor &mean, &invstd;
  const OptionalTensor &weight, &bias, &residual;
};
void check_batch_norm(const char* op, const Tensor& input, const BatchNormArguments& arguments);

// Throws unless running statistics can be moved towards those of `count` values.
void check_running_stats(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                         const Tensor& var, int64_t count);

IntList shape_of(const Tensor& x);  // of 4 dimensions

// --- memory --------------------------------------------------------------------------------------
// What torch calls the memory of a dense tensor: contiguous, where it could be called either.
torch::headeronly::MemoryFormat format_of(const Tensor& x);

// Whether torch calls the strides channels_last where a size of 1 leaves that open: ATen's
// convolution gives channels_last for an input or a weight of which it does.
bool suggests_channels_last(const Tensor& x);

// A tensor the kernels can walk: contiguous or channels_last.
Tensor dense(const Tensor& x);

// The tensor in x's memory order.
Tensor laid_out_as(const Tensor& x, const Tensor& tensor);

// In place of a gradient nobody asked for.
Tensor nothing(const Tensor& like);

}  // namespace torchweld::ops
