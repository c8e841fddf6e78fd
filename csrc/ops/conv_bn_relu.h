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

// What follows a convolution.
struct BatchNormArguments {
  const OptionalTensor &weight, &bias, &residual;
  const std::string& activation;
};

// Shape of the convolution's output. Throws unless everything but statistics fits it.
IntList check_conv_bn_relu(const char* op, const Tensor& input, const Tensor& weight,
                           const OptionalTensor& bias, const BatchNormArguments& bn,
                           const Convolution& conv);

// Throws unless everything but statistics fits the convolution that was.
void check_conv_bn_relu_backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                 const Tensor& weight, const BatchNormArguments& bn,
                                 const Tensor& conv_output, const Convolution& conv,
                                 const std::vector<bool>& output_mask);

// Throws unless these are statistics of a batch beside `like`: float64.
void check_statistics(const char* op, const Tensor& mean, const Tensor& invstd, int64_t channels,
                      const Tensor& like);

// Throws unless these are running statistics beside `like`, of a dtype batch norm mixes with it.
void check_running(const char* op, const Tensor& running_mean, const Tensor& running_var,
                   int64_t channels, const Tensor& like);

// Throws unless batch norm can run apart from the convolution, and back.
void check_batch_norm_relu(const char* op, const Tensor& input, const Tensor& mean,
                           const Tensor& invstd, const BatchNormArguments& bn);
void check_batch_norm_relu_backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                    const Tensor& mean, const Tensor& invstd,
                                    const BatchNormArguments& bn);
void check_sums(const char* op, const Tensor& sum_g, const Tensor& sum_g_xhat, const Tensor& count,
                const Tensor& input);

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

// As torch::stable::contiguous, which looks its operator up by name with every call: what already
// is does not come to it.
Tensor to_contiguous(const Tensor& x);
Tensor channels_last(const Tensor& x);

// In place of a gradient nobody asked for.
Tensor nothing(const Tensor& like);

}  // namespace torchweld::ops
