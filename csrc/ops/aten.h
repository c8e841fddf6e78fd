// Calls into ATen's own operators. An error inside one arrives here without its message, so
// everything it might refuse is checked before.
#pragma once

#include <array>

#include "ops/torch_compat.h"

namespace torchweld::ops {

struct Convolution {
  IntList stride;
  IntList padding;
  IntList dilation;
  int64_t groups;

  // Of the output along rows (0) or columns (1), for an input of `size`.
  int64_t output_size(int axis, int64_t size, int64_t taps) const {
    const size_t i = static_cast<size_t>(axis);
    return (size + 2 * padding[i] - dilation[i] * (taps - 1) - 1) / stride[i] + 1;
  }
};

namespace aten {

inline Tensor convolution(const Tensor& input, const Tensor& weight,
                          const std::optional<Tensor>& bias, const Convolution& conv) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(input),       from(weight),        from(bias),
                                    from(conv.stride), from(conv.padding),  from(conv.dilation),
                                    from(false),       from(IntList{0, 0}), from(conv.groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// relu(convolution + bias + residual) in one kernel of cuDNN, in the memory format of
// convolution(); nothing where cuDNN has none. It heeds the switches for TF32 and benchmarking.
inline std::optional<Tensor> cudnn_convolution_relu(const Tensor& input, const Tensor& weight,
                                                    const std::optional<Tensor>& bias,
                                                    const std::optional<Tensor>& residual,
                                                    const Convolution& conv) {
  using torch::stable::detail::from;
  std::vector<StableIValue> stack{from(input), from(weight)};
  // None: residual counts once. ATen's other kinds of number cannot cross the Stable ABI.
  if (residual) stack.insert(stack.end(), {from(*residual), from(std::nullopt)});
  stack.insert(stack.end(), {from(bias), from(conv.stride), from(conv.padding), from(conv.dilation),
                             from(conv.groups)});
  const char* name = residual ? "aten::cudnn_convolution_add_relu" : "aten::cudnn_convolution_relu";
  if (torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) return {};
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Gradients for input and weight; one that is not asked for is an undefined tensor.
inline std::tuple<Tensor, Tensor> call_convolution_backward(const Tensor& grad_output,
                                                            const Tensor& input,
                                                            const Tensor& weight,
                                                            const Convolution& conv,
                                                            bool input_grad, bool weight_grad) {
  using torch::stable::detail::from;
  const std::array<bool, 3> output_mask{input_grad, weight_grad, false};
  std::array<StableIValue, 11> stack{
      from(grad_output),
      from(input),
      from(weight),
      from(std::nullopt),  // bias_sizes
      from(conv.stride),
      from(conv.padding),
      from(conv.dilation),
      from(false),
      from(IntList{0, 0}),
      from(conv.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(output_mask))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  using torch::stable::detail::to;
  std::tuple<Tensor, Tensor> result{to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  to<Tensor>(stack[2]);  // takes ownership, so that it is freed
  return result;
}

inline std::tuple<Tensor, Tensor> convolution_backward(const Tensor& grad_output,
                                                       const Tensor& input, const Tensor& weight,
                                                       const Convolution& conv, bool input_grad,
                                                       bool weight_grad) {
  // oneDNN's bfloat16 weight gradient of a dilated convolution is wrong in channels_last memory
  // (torch 2.13: off by more than its own size), so that one is computed in contiguous memory.
  const bool dilated = conv.dilation[0] != 1 || conv.dilation[1] != 1;
  const auto is_channels_last = [](const Tensor& t) {
    return !t.is_contiguous() && t.stride(1) == 1;
  };
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  const bool affected = input.is_cpu() && input.scalar_type() == ScalarType::BFloat16;
  if (!weight_grad || !dilated || !channels_last || !affected) {
    return call_convolution_backward(grad_output, input, weight, conv, input_grad, weight_grad);
  }
  using torch::stable::contiguous;
  const Tensor for_weight = std::get<1>(call_convolution_backward(
      contiguous(grad_output), contiguous(input), contiguous(weight), conv, false, true));
  std::tuple<Tensor, Tensor> result;
  if (input_grad) {
    result = call_convolution_backward(grad_output, input, weight, conv, true, false);
  }
  std::get<1>(result) = contiguous(for_weight, torch::headeronly::MemoryFormat::ChannelsLast);
  return result;
}

}  // namespace aten
}  // namespace torchweld::ops
