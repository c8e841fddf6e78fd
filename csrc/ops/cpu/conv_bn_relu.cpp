#include "ops/conv_bn_relu.h"

#include <cmath>

#include "ops/cpu/convolve.h"
#include "ops/memory.h"

namespace torchweld::ops {
namespace {

template <class T>
Channels read_as(const Tensor& tensor) {
  const T* data = tensor.const_data_ptr<T>();
  return Channels(data, data + tensor.numel());
}

// Per-channel values in double; `otherwise` for every channel where there is no tensor.
Channels read_channels(const OptionalTensor& tensor, int64_t channels, double otherwise = 0) {
  if (!tensor) return Channels(channels, otherwise);
  const Tensor values = to_contiguous(*tensor);
  switch (*to_dtype(values.scalar_type())) {
    case kernels::DType::float32:
      return read_as<float>(values);
    case kernels::DType::float64:
      return read_as<double>(values);
    case kernels::DType::bfloat16:
      return read_as<torch::headeronly::BFloat16>(values);
    default:
      return read_as<torch::headeronly::Half>(values);
  }
}

template <class T>
void write_as(const Tensor& tensor, const Channels& values) {
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<T>());
}

Tensor to_tensor(const Channels& values, ScalarType type = ScalarType::Double) {
  const int64_t size = values.size();
  const Tensor tensor = empty({size}, type, torch::headeronly::MemoryFormat::Contiguous);
  switch (*to_dtype(type)) {
    case kernels::DType::float32:
      write_as<float>(tensor, values);
      break;
    case kernels::DType::float64:
      write_as<double>(tensor, values);
      break;
    case kernels::DType::bfloat16:
      write_as<torch::headeronly::BFloat16>(tensor, values);
      break;
    default:
      write_as<torch::headeronly::Half>(tensor, values);
  }
  return tensor;
}

BatchNorm batch_norm(const char* op, int64_t channels, Channels mean, Channels invstd,
                     const OptionalTensor& weight, const OptionalTensor& bias,
                     const std::string& activation, double negative_slope) {
  return {std::move(mean),
          std::move(invstd),
          read_channels(weight, channels, 1),
          read_channels(bias, channels, 0),
          to_activation(op, activation),
          negative_slope};
}

// With statistics as operators take them.
BatchNorm batch_norm(const char* op, const Tensor& mean, const Tensor& invstd,
                     const OptionalTensor& weight, const OptionalTensor& bias,
                     const std::string& activation, double negative_slope) {
  const int64_t channels = mean.numel();
  return batch_norm(op, channels, read_channels(mean, channels), read_channels(invstd, channels),
                    weight, bias, activation, negative_slope);
}

// 1 / sqrt(var + eps). Every op that needs it for the same statistics gets the same bits.
Channels inverse_std(Channels var, double eps) {
  for (double& v : var) v = 1 / std::sqrt(v + eps);
  return var;
}

// --- training and frozen forward -----------------------------------------------------------------
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_relu(
    Tensor input, Tensor weight, OptionalTensor bias, OptionalTensor bn_weight,
    OptionalTensor bn_bias, OptionalTensor residual, IntList stride, IntList padding,
    IntList dilation, int64_t groups, double eps, String activation, double negative_slope) {
  const char* op = "conv_bn_relu";
  const Convolution conv{stride, padding, dilation, groups};
  const IntList shape =
      check_conv_bn_relu(op, input, weight, bias, {bn_weight, bn_bias, residual, activation}, conv);

  const NoGradGuard no_grad;
  Moments m;
  const Tensor conv_output = convolve(input, weight, bias, conv, &m);
  Channels var = m.m2;
  for (double& v : var) v /= m.count > 0 ? m.count : 1;
  const BatchNorm bn = batch_norm(op, shape[1], m.mean, inverse_std(var, eps), bn_weight, bn_bias,
                                  activation, negative_slope);
  const Tensor output = empty_as(conv_output);
  Normalization(conv_output, bn, residual).forward(output);
  return {output, conv_output, to_tensor(bn.mean), to_tensor(bn.invstd), to_tensor(var)};
}

std::tuple<Tensor, Tensor> conv_bn_relu_frozen(Tensor input, Tensor weight, OptionalTensor bias,
                                               OptionalTensor bn_weight, OptionalTensor bn_bias,
                                               Tensor running_mean, Tensor running_var,
                                               OptionalTensor residual, IntList stride,
                                               IntList padding, IntList dilation, int64_t groups,
                                               double eps, String activation,
                                               double negative_slope) {
  const char* op = "conv_bn_relu_frozen";
  const Convolution conv{stride, padding, dilation, groups};
  const IntList shape =
      check_conv_bn_relu(op, input, weight, bias, {bn_weight, bn_bias, residual, activation}, conv);
  check_running(op, running_mean, running_var, shape[1], input);

  const BatchNorm bn = batch_norm(op, shape[1], read_channels(running_mean, shape[1]),
                                  inverse_std(read_channels(running_var, shape[1]), eps), bn_weight,
                                  bn_bias, activation, negative_slope);
  const NoGradGuard no_grad;
  const Tensor conv_output = convolve(input, weight, bias, conv, nullptr);
  const Tensor output = empty_as(conv_output);
  Normalization(conv_output, bn, residual).forward(output);
  return {output, conv_output};
}

Tensor conv_relu(Tensor input, Tensor weight, OptionalTensor packed_weight, OptionalTensor bias,
                 OptionalTensor residual, IntList stride, IntList padding, IntList dilation,
                 int64_t groups, String activation, double negative_slope) {
  const char* op = "conv_relu";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu(op, input, weight, bias, {std::nullopt, std::nullopt, residual, activation},
                     conv);
  const NoGradGuard no_grad;
  return convolve(input, weight, packed_weight, bias, residual, conv, to_activation(op, activation),
                  negative_slope);
}

Tensor conv_relu_pack(Tensor weight, IntList stride, IntList padding, IntList dilation,
                      int64_t groups) {
  const Convolution conv{stride, padding, dilation, groups};
  check_weight("conv_relu_pack", weight, conv);
  const NoGradGuard no_grad;
  return pack_weight(weight, conv);
}

// --- backward ------------------------------------------------------------------------------------
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Gradients for input, weight, bias, bn_weight, bn_bias and residual, as output_mask asks; an empty
// tensor for each of the others.
Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                   const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                   const OptionalTensor& residual, const Tensor& saved_conv_output,
                   const BatchNorm& bn, const Convolution& conv,
                   const std::vector<bool>& output_mask, bool frozen) {
  const NoGradGuard no_grad;
  const Tensor conv_output = dense(saved_conv_output);
  const IntList shape = shape_of(conv_output);
  const Tensor grad_y = laid_out_as(conv_output, grad_output);
  const bool conv_grad = output_mask[0] || output_mask[1];
  const bool need_sums = output_mask[3] || output_mask[4] || (frozen ? output_mask[2] : conv_grad);
  const Normalization normalization(conv_output, bn, residual);
  const Sums sums = need_sums ? normalization.reduce(grad_y) : Sums{};

  const auto absent = [&](int i) { return output_mask[i] ? Tensor() : nothing(input); };
  Gradients gradients{absent(0), absent(1), absent(2), absent(3), absent(4), absent(5)};
  auto& [grad_input, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias, grad_residual] =
      gradients;
  if (output_mask[2]) {
    // Batch statistics take a constant back out of every channel: the exact gradient is 0.
    Channels values(shape[1]);
    for (int64_t c = 0; frozen && c < shape[1]; ++c) values[c] = bn.scale(c) * sums.g[c];
    grad_bias = to_tensor(values, input.scalar_type());
  }
  if (output_mask[3]) {
    grad_bn_weight =
        to_tensor(sums.g_xhat, bn_weight ? bn_weight->scalar_type() : input.scalar_type());
  }
  if (output_mask[4]) {
    grad_bn_bias = to_tensor(sums.g, bn_bias ? bn_bias->scalar_type() : input.scalar_type());
  }
  if (output_mask[5]) grad_residual = empty_as(conv_output);
  const double count = static_cast<double>(shape[0] * shape[2] * shape[3]);
  const Normalization::Gradient gradient(normalization, grad_y,
                                         frozen || !conv_grad ? nullptr : &sums, count,
                                         output_mask[5] ? &grad_residual : nullptr);
  if (conv_grad) {
    auto [for_input, for_weight] =
        convolve_backward(gradient, input, weight, conv, output_mask[0], output_mask[1]);
    if (output_mask[0]) grad_input = for_input;
    if (output_mask[1]) grad_weight = for_weight;
  } else if (output_mask[5]) {
    gradient.residual();
  }
  return gradients;
}

Gradients conv_bn_relu_backward(Tensor grad_output, Tensor input, Tensor weight,
                                OptionalTensor bn_weight, OptionalTensor bn_bias,
                                OptionalTensor residual, Tensor conv_output, Tensor mean,
                                Tensor invstd, IntList stride, IntList padding, IntList dilation,
                                int64_t groups, String activation, double negative_slope,
                                std::vector<bool> output_mask) {
  const char* op = "conv_bn_relu_backward";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu_backward(op, grad_output, input, weight,
                              {bn_weight, bn_bias, residual, activation}, conv_output, conv,
                              output_mask);
  check_statistics(op, mean, invstd, weight.size(0), input);
  const BatchNorm bn = batch_norm(op, mean, invstd, bn_weight, bn_bias, activation, negative_slope);
  return backward(grad_output, input, weight, bn_weight, bn_bias, residual, conv_output, bn, conv,
                  output_mask, false);
}

Gradients conv_bn_relu_frozen_backward(Tensor grad_output, Tensor input, Tensor weight,
                                       OptionalTensor bn_weight, OptionalTensor bn_bias,
                                       Tensor running_mean, Tensor running_var,
                                       OptionalTensor residual, Tensor conv_output, IntList stride,
                                       IntList padding, IntList dilation, int64_t groups,
                                       double eps, String activation, double negative_slope,
                                       std::vector<bool> output_mask) {
  const char* op = "conv_bn_relu_frozen_backward";
  const Convolution conv{stride, padding, dilation, groups};
  check_conv_bn_relu_backward(op, grad_output, input, weight,
                              {bn_weight, bn_bias, residual, activation}, conv_output, conv,
                              output_mask);
  const int64_t channels = weight.size(0);
  check_running(op, running_mean, running_var, channels, input);
  const BatchNorm bn = batch_norm(op, channels, read_channels(running_mean, channels),
                                  inverse_std(read_channels(running_var, channels), eps), bn_weight,
                                  bn_bias, activation, negative_slope);
  return backward(grad_output, input, weight, bn_weight, bn_bias, residual, conv_output, bn, conv,
                  output_mask, true);
}

// --- statistics ----------------------------------------------------------------------------------
template <class T>
void move_towards(const Tensor& running, const Channels& batch, double momentum) {
  T* data = running.mutable_data_ptr<T>();
  for (size_t c = 0; c < batch.size(); ++c) {
    data[c] = static_cast<T>((1 - momentum) * static_cast<double>(data[c]) + momentum * batch[c]);
  }
}

void move_towards(const Tensor& running, const Channels& batch, double momentum) {
  switch (*to_dtype(running.scalar_type())) {
    case kernels::DType::float32:
      return move_towards<float>(running, batch, momentum);
    case kernels::DType::float64:
      return move_towards<double>(running, batch, momentum);
    case kernels::DType::bfloat16:
      return move_towards<torch::headeronly::BFloat16>(running, batch, momentum);
    default:
      return move_towards<torch::headeronly::Half>(running, batch, momentum);
  }
}

void update_running_stats(Tensor running_mean, Tensor running_var, Tensor mean, Tensor var,
                          int64_t count, double momentum) {
  check_running_stats(running_mean, running_var, mean, var, count);
  if (count == 0) return;  // an empty batch says nothing
  const int64_t channels = mean.size(0);
  Channels unbiased = read_channels(var, channels);
  for (double& v : unbiased) v *= static_cast<double>(count) / static_cast<double>(count - 1);
  move_towards(running_mean, read_channels(mean, channels), momentum);
  move_towards(running_var, unbiased, momentum);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_stats(Tensor input) {
  check_activations("batch_norm_stats", "input", input);
  const NoGradGuard no_grad;
  const Moments m = moments_of(dense(input));
  return {to_tensor({m.count}), to_tensor(m.mean), to_tensor(m.m2)};
}

// --- normalize apart from the convolution --------------------------------------------------------
Tensor batch_norm_relu(Tensor input, Tensor mean, Tensor invstd, OptionalTensor bn_weight,
                       OptionalTensor bn_bias, OptionalTensor residual, String activation,
                       double negative_slope) {
  const char* op = "batch_norm_relu";
  check_batch_norm_relu(op, input, mean, invstd, {bn_weight, bn_bias, residual, activation});
  const BatchNorm bn = batch_norm(op, mean, invstd, bn_weight, bn_bias, activation, negative_slope);
  const NoGradGuard no_grad;
  const Tensor x = dense(input);
  const Tensor output = empty_as(x);
  Normalization(x, bn, residual).forward(output);
  return output;
}

std::tuple<Tensor, Tensor> batch_norm_relu_backward_reduce(
    Tensor grad_output, Tensor input, Tensor mean, Tensor invstd, OptionalTensor bn_weight,
    OptionalTensor bn_bias, OptionalTensor residual, String activation, double negative_slope) {
  const char* op = "batch_norm_relu_backward_reduce";
  check_batch_norm_relu_backward(op, grad_output, input, mean, invstd,
                                 {bn_weight, bn_bias, residual, activation});
  const BatchNorm bn = batch_norm(op, mean, invstd, bn_weight, bn_bias, activation, negative_slope);
  const NoGradGuard no_grad;
  const Tensor x = dense(input);
  const Sums sums = Normalization(x, bn, residual).reduce(laid_out_as(x, grad_output));
  return {to_tensor(sums.g), to_tensor(sums.g_xhat)};
}

std::tuple<Tensor, Tensor> batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor mean,
                                                    Tensor invstd, OptionalTensor bn_weight,
                                                    OptionalTensor bn_bias, OptionalTensor residual,
                                                    Tensor sum_g, Tensor sum_g_xhat, Tensor count,
                                                    String activation, double negative_slope) {
  const char* op = "batch_norm_relu_backward";
  check_batch_norm_relu_backward(op, grad_output, input, mean, invstd,
                                 {bn_weight, bn_bias, residual, activation});
  check_sums(op, sum_g, sum_g_xhat, count, input);
  const BatchNorm bn = batch_norm(op, mean, invstd, bn_weight, bn_bias, activation, negative_slope);
  const NoGradGuard no_grad;
  const Tensor x = dense(input);
  const Tensor grad_y = laid_out_as(x, grad_output);
  const Tensor grad_residual = residual ? empty_as(x) : nothing(x);
  const Sums sums{read_channels(sum_g, x.size(1)), read_channels(sum_g_xhat, x.size(1))};
  const Normalization normalization(x, bn, residual);
  const Normalization::Gradient gradient(normalization, grad_y, &sums,
                                         *count.const_data_ptr<double>(),
                                         residual ? &grad_residual : nullptr);
  return {gradient.all(), grad_residual};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("conv_bn_relu", TORCH_BOX(&conv_bn_relu));
  m.impl("conv_bn_relu_backward", TORCH_BOX(&conv_bn_relu_backward));
  m.impl("conv_bn_relu_frozen", TORCH_BOX(&conv_bn_relu_frozen));
  m.impl("conv_bn_relu_frozen_backward", TORCH_BOX(&conv_bn_relu_frozen_backward));
  m.impl("conv_relu", TORCH_BOX(&conv_relu));
  m.impl("conv_relu_pack", TORCH_BOX(&conv_relu_pack));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_relu", TORCH_BOX(&batch_norm_relu));
  m.impl("batch_norm_relu_backward_reduce", TORCH_BOX(&batch_norm_relu_backward_reduce));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&batch_norm_relu_backward));
}

}  // namespace torchweld::ops
