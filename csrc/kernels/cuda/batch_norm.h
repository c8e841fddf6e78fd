// Batch norm of a dense [N, C, H, W] tensor on a CUDA device: statistics, normalize + residual +
// activation, and its backward.
//
// All pointers are to device memory. A launcher does not wait; it returns what the launch returned.
// Equal parameters give equal bits on every device: work is cut by shape alone, and partial results
// are merged in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "kernels/conv_bn_relu.h"

namespace torchweld::kernels::cuda {

struct BatchNormShape {
  int64_t batch, channels, pixels;
  Layout layout;
  DType dtype;

  int64_t values() const { return batch * pixels; }  // per channel
  int64_t size() const { return values() * channels; }
};

// One value per channel: `otherwise` if there is no memory.
struct ChannelValues {
  const void* data;
  DType dtype;
  double otherwise;
};
// Not written if there is no memory.
struct ChannelResult {
  void* data;
  DType dtype;
};

struct BatchNormInput {
  ChannelValues mean;
  ChannelValues invstd;  // or variances, if `of_variance`: then 1 / sqrt(variance + eps) is meant
  ChannelValues weight, bias;
  bool of_variance;
  double eps;
  Activation activation;
  double negative_slope;
};

// Doubles of scratch memory that the two reductions need.
int64_t batch_norm_scratch(const BatchNormShape& shape);

// --- forward -------------------------------------------------------------------------------------
struct StatisticsParams {
  BatchNormShape shape;
  const void* x;
  double* scratch;
  double eps;
  // Each may be null. `var` is biased.
  double* count;  // [1]
  double *mean, *m2, *var, *invstd;
};
cudaError_t launch_batch_norm_statistics(const StatisticsParams& params, cudaStream_t stream);

// running <- (1 - momentum) * running + momentum * batch; var * correction is unbiased.
struct UpdateParams {
  int64_t channels;
  ChannelResult running_mean, running_var;
  const double *mean, *var;
  double correction, momentum;
};
cudaError_t launch_update_running_stats(const UpdateParams& params, cudaStream_t stream);

struct BatchNormReLUParams {
  BatchNormShape shape;
  BatchNormInput bn;
  const void* x;
  const void* residual;  // or null
  void* y;               // may be x
};
cudaError_t launch_batch_norm_relu(const BatchNormReLUParams& params, cudaStream_t stream);

// --- backward ------------------------------------------------------------------------------------
// Sums g and g * xhat.
struct ReduceParams {
  BatchNormShape shape;
  BatchNormInput bn;
  const void* x;
  const void* residual;
  const void* grad_y;
  double* scratch;
  double *sum_g, *sum_g_xhat;
  // The same as gradients of the batch norm's parameters; and of a bias in front of it, whose
  // gradient is scale * sum_g where statistics are constants.
  ChannelResult grad_weight, grad_bias, grad_shift;
};
cudaError_t launch_batch_norm_relu_reduce(const ReduceParams& params, cudaStream_t stream);

struct ApplyParams {
  BatchNormShape shape;
  BatchNormInput bn;
  const void* x;
  const void* residual;
  const void* grad_y;
  // Null where statistics are constants.
  const double *sum_g, *sum_g_xhat;
  const double* count;  // values per channel behind the sums; null: those of the shape
  // Either may be null.
  void* grad_x;
  void* grad_residual;
};
cudaError_t launch_batch_norm_relu_apply(const ApplyParams& params, cudaStream_t stream);

// --- small tensors -------------------------------------------------------------------------------
// All passes in one launch, for tensors over which launches take longer than memory does: a block
// computes statistics, or sums, of its channels and goes on with them. The tensors are those of the
// launches above, of which these make the results.
bool batch_norm_is_small(const BatchNormShape& shape);
cudaError_t launch_batch_norm_relu_train(const StatisticsParams& statistics,
                                         const BatchNormReLUParams& params, cudaStream_t stream);
cudaError_t launch_batch_norm_relu_backward(const ReduceParams& sums, const ApplyParams& params,
                                            cudaStream_t stream);

}  // namespace torchweld::kernels::cuda
