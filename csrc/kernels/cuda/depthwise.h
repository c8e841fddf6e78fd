// Convolution with one channel to a group of [N, H, W, C] tensors on a CUDA device, for float32,
// bfloat16 and float16: forward, and the gradients of input and weight.
//
// Sums are chains of float32 fused multiply-adds, rounded once. A launcher does not wait. Equal
// parameters give equal bits on every device: work is cut by shape alone, and partial results are
// merged in a fixed order.
#pragma once

#include "kernels/cuda/batch_norm.h"

namespace torchweld::kernels::cuda {

// Tap t of output pixel p lies on input pixel p * stride + t * dilation - padding.
struct DepthwiseAxis {
  int size, out_size;  // of input and output
  int taps, stride, padding, dilation;
};

struct DepthwiseShape {
  int64_t batch, channels;
  DepthwiseAxis rows, columns;
  DType dtype;
};

// Whether the kernels can compute all three passes of the shape.
bool depthwise_can(const DepthwiseShape& shape);

// y = activation(convolution of x + bias + residual).
struct DepthwiseForwardParams {
  DepthwiseShape shape;
  const void* x;
  const void* weight;    // [C, R, S]
  ChannelValues bias;    // 0 without memory
  const void* residual;  // or null
  Activation activation;
  double negative_slope;
  void* y;
};
cudaError_t launch_depthwise(const DepthwiseForwardParams& params, cudaStream_t stream);

struct DepthwiseInputGradientParams {
  DepthwiseShape shape;
  const void* grad_y;
  const void* weight;
  void* grad_x;
};
cudaError_t launch_depthwise_input_gradient(const DepthwiseInputGradientParams& params,
                                            cudaStream_t stream);

struct DepthwiseWeightGradientParams {
  DepthwiseShape shape;
  const void* x;
  const void* grad_y;
  double* scratch;
  void* grad_weight;  // [C, R, S]
};
int64_t depthwise_scratch(const DepthwiseShape& shape);  // doubles
cudaError_t launch_depthwise_weight_gradient(const DepthwiseWeightGradientParams& params,
                                             cudaStream_t stream);

}  // namespace torchweld::kernels::cuda
