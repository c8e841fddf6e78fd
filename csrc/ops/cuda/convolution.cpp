#include "ops/cuda/convolution.h"

#include <array>
#include <atomic>

#include "ops/algorithm.h"
#include "ops/cuda/batch_norm.h"
#include "ops/cuda/rule.h"

namespace torchweld::ops {
namespace {

using namespace kernels::cuda;
using torch::headeronly::MemoryFormat;

// config().convolution lives in the library of the CPU's operators.
Algorithm asked_for() {
  StableIValue stack[1]{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("torchweld::_convolution_algorithm", "", stack, TORCH_ABI_VERSION));
  return static_cast<Algorithm>(torch::stable::detail::to<int64_t>(stack[0]));
}

// Only tensors that ATen's convolution takes, and returns, as channels_last.
bool is_channels_last(const Tensor& input, const Tensor& weight) {
  return input.numel() > 0 && (suggests_channels_last(input) || suggests_channels_last(weight));
}

Tensor empty_channels_last(const Tensor& like, const IntList& sizes) {
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

// --- depthwise -----------------------------------------------------------------------------------
// The shape, where our kernels take it and are asked for or expected to be fastest.
std::optional<DepthwiseShape> depthwise_shape(const Tensor& input, const Tensor& weight,
                                              const Convolution& conv) {
  const int64_t channels = input.size(1);
  if (conv.groups != channels || weight.size(0) != channels) return {};
  if (!is_channels_last(input, weight)) return {};
  const Algorithm algorithm = asked_for();
  if (algorithm != Algorithm::automatic && algorithm != Algorithm::depthwise) return {};

  bool fits = true;
  const auto narrow = [&](int64_t value) {
    fits = fits && value <= INT32_MAX;
    return static_cast<int>(value);
  };
  const auto axis = [&](int i) {
    const int64_t size = input.size(2 + i), taps = weight.size(2 + i);
    return DepthwiseAxis{narrow(size),
                         narrow(conv.output_size(i, size, taps)),
                         narrow(taps),
                         narrow(conv.stride[i]),
                         narrow(conv.padding[i]),
                         narrow(conv.dilation[i])};
  };
  const DepthwiseShape shape{input.size(0), channels, axis(0), axis(1),
                             batch_norm::dtype_of(input)};
  if (!fits || !depthwise_can(shape)) return {};
  if (algorithm == Algorithm::automatic && !rule::depthwise(shape)) return {};
  return shape;
}

// Of a channel's taps, which follow one another in every layout of a dense [C, 1, R, S].
Tensor taps_of(const Tensor& weight) { return torch::stable::contiguous(weight); }

Tensor run_depthwise(const CudaContext& context, const DepthwiseShape& shape, const Tensor& input,
                     const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, kernels::Activation activation,
                     double negative_slope) {
  const Tensor x = channels_last(input), w = taps_of(weight);
  OptionalTensor b, r;
  if (bias) b = torch::stable::contiguous(*bias);
  if (residual) r = channels_last(*residual);
  const Tensor output = empty_channels_last(
      input, {input.size(0), input.size(1), shape.rows.out_size, shape.columns.out_size});
  context.check(launch_depthwise({.shape = shape,
                                  .x = x.const_data_ptr(),
                                  .weight = w.const_data_ptr(),
                                  .bias = {batch_norm::data_or_null(b), shape.dtype, 0},
                                  .residual = batch_norm::data_or_null(r),
                                  .activation = activation,
                                  .negative_slope = negative_slope,
                                  .y = output.mutable_data_ptr()},
                                 context.stream()));
  return output;
}

// --- cuDNN's fused convolution -------------------------------------------------------------------
// ATen asks for it at any size; cuDNN before 9.3 cannot count further than this.
bool has_32_bit_offsets(const Tensor& input, const Tensor& weight, const Convolution& conv) {
  const int64_t output = input.size(0) * weight.size(0) *
                         conv.output_size(0, input.size(2), weight.size(2)) *
                         conv.output_size(1, input.size(3), weight.size(3));
  return input.numel() <= INT32_MAX && output <= INT32_MAX;
}

OptionalTensor run_cudnn(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& residual, const Convolution& conv) {
  // A cuDNN that has no such kernel for one layer may have none for others of its dtype, and to ask
  // again for every call costs more than is lost.
  static std::array<std::atomic<bool>, kernels::kDTypeCount> refusals{};
  std::atomic<bool>& refused = refusals[static_cast<size_t>(batch_norm::dtype_of(input))];
  if (refused) return {};
  OptionalTensor b;
  if (bias) b = torch::stable::contiguous(*bias);
  const OptionalTensor output = aten::cudnn_convolution_relu(input, weight, b, residual, conv);
  if (!output) refused = true;
  return output;
}

}  // namespace

Tensor convolve(const CudaContext& context, const Tensor& input, const Tensor& weight,
                const OptionalTensor& bias, const Convolution& conv) {
  if (const auto shape = depthwise_shape(input, weight, conv)) {
    return run_depthwise(context, *shape, input, weight, bias, std::nullopt,
                         kernels::Activation::identity, 0);
  }
  return dense(aten::convolution(input, weight, bias, conv));
}

OptionalTensor convolve_at_once(const CudaContext& context, const Tensor& input,
                                const Tensor& weight, const OptionalTensor& bias,
                                const OptionalTensor& residual, const Convolution& conv,
                                kernels::Activation activation, double negative_slope) {
  if (const auto shape = depthwise_shape(input, weight, conv)) {
    return run_depthwise(context, *shape, input, weight, bias, residual, activation,
                         negative_slope);
  }
  if (activation != kernels::Activation::relu || conv.groups != 1) return {};
  if (input.scalar_type() == ScalarType::Double || !is_channels_last(input, weight)) return {};
  const Algorithm algorithm = asked_for();
  const bool wins = algorithm == Algorithm::automatic && rule::cudnn(weight);
  if (!wins && algorithm != Algorithm::cudnn) return {};
  if (!has_32_bit_offsets(input, weight, conv)) return {};
  return run_cudnn(input, weight, bias, residual, conv);
}

std::tuple<Tensor, Tensor> convolve_backward(const CudaContext& context, const Tensor& grad_output,
                                             const Tensor& input, const Tensor& weight,
                                             const Convolution& conv, bool input_grad,
                                             bool weight_grad) {
  const auto shape = depthwise_shape(input, weight, conv);
  if (!shape) {
    return aten::convolution_backward(grad_output, input, weight, conv, input_grad, weight_grad);
  }
  const Tensor grad_y = channels_last(grad_output);
  std::tuple<Tensor, Tensor> result;
  if (input_grad) {
    const Tensor w = taps_of(weight), grad_x = empty_channels_last(input, shape_of(input));
    context.check(launch_depthwise_input_gradient(
        {*shape, grad_y.const_data_ptr(), w.const_data_ptr(), grad_x.mutable_data_ptr()},
        context.stream()));
    std::get<0>(result) = grad_x;
  }
  if (weight_grad) {
    const Tensor x = channels_last(input), grad_w = empty_channels_last(input, shape_of(weight));
    CudaScratch scratch;
    const int64_t place = scratch.reserve<double>(depthwise_scratch(*shape));
    scratch.allocate(input);
    context.check(
        launch_depthwise_weight_gradient({*shape, x.const_data_ptr(), grad_y.const_data_ptr(),
                                          scratch.at<double>(place), grad_w.mutable_data_ptr()},
                                         context.stream()));
    std::get<1>(result) = grad_w;
  }
  return result;
}

}  // namespace torchweld::ops
