#include "ops/cpu/convolve.h"

#include <algorithm>

#include "ops/cpu/choose.h"
#include "ops/memory.h"

namespace torchweld::ops {
namespace {

using torch::headeronly::MemoryFormat;

// Whether ours is asked for at all: channels_last by ATen's rule (at::native's
// mkldnn_conv_use_channels_last), so the output has the strides ATen's would have.
bool is_ours(const Tensor& input, const Tensor& weight, ScalarType type) {
  return input.scalar_type() == type && input.numel() > 0 &&
         (suggests_channels_last(input) || suggests_channels_last(weight));
}
bool is_ours(const Tensor& input, const Tensor& weight) {
  return is_ours(input, weight, ScalarType::Float);
}

template <class T = float>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

Tensor vector_of(int64_t size) {
  return empty({1, 1, 1, size}, ScalarType::Float, MemoryFormat::Contiguous);
}

// As float32: what is added to sums is. Not by ATen, whose calls cost more than a small layer has.
class Bias {
 public:
  explicit Bias(const OptionalTensor& bias) {
    if (!bias) return;
    tensor_ = to_contiguous(*bias);
    if (tensor_->scalar_type() != ScalarType::BFloat16) return;
    const auto* from = data<torch::headeronly::BFloat16>(*tensor_);
    widened_.assign(from, from + tensor_->numel());
  }
  const float* get() const {
    if (!widened_.empty()) return widened_.data();
    return tensor_ ? data(*tensor_) : nullptr;
  }

 private:
  OptionalTensor tensor_;
  std::vector<float> widened_;
};

// The bounds an activation clamps to, where that is all it does.
template <class T>
bool clamp(kernels::Activation activation, kernels::EpilogueOf<T>& epilogue) {
  using kernels::Activation;
  if (activation != Activation::relu && activation != Activation::relu6) return false;
  epilogue.low = 0;
  if (activation == Activation::relu6) epilogue.high = 6;
  return true;
}

}  // namespace

Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                const Convolution& conv, Moments* moments) {
  if (is_ours(input, weight)) {
    const ConvolutionShape shape = to_shape(input, weight, conv);
    if (const ConvolutionAlgorithm* algorithm = choose_forward(shape)) {
      const Bias kept(bias);
      kernels::Epilogue epilogue;
      epilogue.bias = kept.get();
      BlockMoments blocks;
      const Tensor output =
          run_forward(*algorithm, shape, input, weight, {}, epilogue, moments ? &blocks : nullptr);
      if (moments) *moments = blocks.merged();
      return output;
    }
  }
  const Tensor output = dense(aten::convolution(input, weight, bias, conv));
  if (moments) *moments = moments_of(output);
  return output;
}

namespace {

// activation(convolution + residual) as far as an algorithm of ours does it; `after` becomes what
// is left to do.
template <class T>
Tensor run_folded(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                  const Tensor& input, const Tensor& weight, const OptionalTensor& packed_weight,
                  const OptionalTensor& bias, const OptionalTensor& residual,
                  kernels::Activation& after) {
  const bool fits = packed_weight && packed_weight->scalar_type() == ScalarType::Float &&
                    packed_weight->is_contiguous() &&
                    packed_weight->numel() == algorithm.packed_size(shape);
  const Bias kept(bias);
  OptionalTensor keep_residual;
  kernels::EpilogueOf<T> epilogue;
  epilogue.bias = kept.get();
  if (residual) {
    keep_residual = channels_last(*residual);
    epilogue.residual = data<T>(*keep_residual);
  }
  if (clamp(after, epilogue)) after = kernels::Activation::identity;
  return run_forward(algorithm, shape, input, weight, fits ? packed_weight : std::nullopt, epilogue,
                     nullptr);
}

}  // namespace

Tensor convolve(const Tensor& input, const Tensor& weight, const OptionalTensor& packed_weight,
                const OptionalTensor& bias, const OptionalTensor& residual, const Convolution& conv,
                kernels::Activation activation, double negative_slope) {
  using kernels::Activation;
  // What is left to do after the convolution.
  OptionalTensor rest = residual;
  Activation after = activation;
  Tensor output;
  const ConvolutionAlgorithm* algorithm = nullptr;
  const bool bfloat16 = is_ours(input, weight, ScalarType::BFloat16);
  if (bfloat16 || is_ours(input, weight)) {
    const ConvolutionShape shape = to_shape(input, weight, conv);
    algorithm = choose_folded(shape, packed_weight ? packed_weight->numel() : 0);
    if (algorithm) {
      const auto run = bfloat16 ? run_folded<BFloat16> : run_folded<float>;
      output = run(*algorithm, shape, input, weight, packed_weight, bias, residual, after);
      rest.reset();
    }
  }
  if (!algorithm) output = dense(aten::convolution(input, weight, bias, conv));
  if (rest || after != Activation::identity) {
    const int64_t channels = weight.size(0);
    const BatchNorm none{Channels(channels),
                         Channels(channels, 1),
                         Channels(channels, 1),
                         Channels(channels, 0),
                         after,
                         negative_slope};
    Normalization(output, none, rest).forward(output);
  }
  return output;
}

Tensor pack_weight(const Tensor& weight, const Convolution& conv) {
  const ScalarType type = weight.scalar_type();
  if (type == ScalarType::Float || type == ScalarType::BFloat16) {
    // The rule looks at the size of an image too, which networks halve where they double channels.
    const int64_t channels = weight.size(1) * conv.groups;
    const int64_t most = std::max<int64_t>(1, std::max(channels, weight.size(0)));
    const int64_t size = std::clamp<int64_t>(64 * 56 / most, 7, 56);
    const ConvolutionShape shape = to_shape({8, channels, size, size}, weight, conv);
    const bool has_pixels = shape.out_height > 0 && shape.out_width > 0;
    if (const ConvolutionAlgorithm* algorithm = has_pixels ? choose_folded(shape, 0) : nullptr)
      return run_pack(*algorithm, shape, weight);
  }
  return vector_of(0);
}

std::tuple<Tensor, Tensor> convolve_backward(const Normalization::Gradient& gradient,
                                             const Tensor& input, const Tensor& weight,
                                             const Convolution& conv, bool input_grad,
                                             bool weight_grad) {
  std::tuple<Tensor, Tensor> result;
  auto& [grad_input, grad_weight] = result;
  // A hook may have brought the saved output back in another memory order.
  if (is_ours(input, weight) && gradient.has_rows()) {
    const ConvolutionShape shape = to_shape(input, weight, conv);
    if (const ConvolutionAlgorithm* algorithm = choose_backward(shape, input_grad, weight_grad)) {
      const Tensor x = channels_last(input), w = channels_last(weight);
      const auto like = [](const Tensor& t) {
        return empty({t.size(0), t.size(1), t.size(2), t.size(3)}, ScalarType::Float,
                     MemoryFormat::ChannelsLast);
      };
      if (input_grad) grad_input = like(input);
      if (weight_grad) grad_weight = like(weight);
      algorithm->backward(
          shape, {.input = data(x),
                  .weight = data(w),
                  .grad_output = [&](int64_t first, int64_t count,
                                     float* rows) { gradient.rows(first, count, rows); },
                  .reads = {data(gradient.grad_y()), data(gradient.x())},
                  .grad_input = input_grad ? grad_input.mutable_data_ptr<float>() : nullptr,
                  .grad_weight = weight_grad ? grad_weight.mutable_data_ptr<float>() : nullptr});
      return result;
    }
  }
  return aten::convolution_backward(gradient.all(), input, weight, conv, input_grad, weight_grad);
}

}  // namespace torchweld::ops
