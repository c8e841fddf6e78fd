#include "ops/cpu/convolution.h"

#include <bit>
#include <cstring>
#include <memory>

#include "ops/check.h"
#include "ops/config.h"
#include "ops/conv_bn_relu.h"
#include "ops/memory.h"

namespace torchweld::ops {
namespace {

using torch::headeronly::MemoryFormat;

const ConvolutionAlgorithm& algorithm_named(const char* op, const std::string& name) {
  const ConvolutionAlgorithm* found = find_algorithm(name);
  TORCHWELD_CHECK(found != nullptr, op, "algorithm", "the name of one", '"' << name << '"');
  return *found;
}

void check_dtype(const char* op, const Tensor& input, bool bfloat16) {
  const ScalarType type = input.scalar_type();
  TORCHWELD_CHECK(type == ScalarType::Float || (bfloat16 && type == ScalarType::BFloat16), op,
                  "input", "float32" << (bfloat16 ? " or bfloat16" : ""), dtype_name(type));
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

Tensor to_tensor(const Moments& moments) {
  const int64_t channels = moments.mean.size();
  const IntList sizes{3, channels};
  Tensor tensor = torch::stable::empty(sizes, ScalarType::Double);
  double* data = tensor.mutable_data_ptr<double>();
  std::fill(data, data + channels, moments.count);
  std::copy(moments.mean.begin(), moments.mean.end(), data + channels);
  std::copy(moments.m2.begin(), moments.m2.end(), data + 2 * channels);
  return tensor;
}

// As it is in training, where weights change at every step, if statistics are wanted; else with a
// packed weight.
template <class T>
Tensor forward_of(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                  const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, double low, double high, BlockMoments* moments) {
  const kernels::EpilogueOf<T> epilogue{.bias = bias ? bias->const_data_ptr<float>() : nullptr,
                                        .residual = residual ? data<T>(*residual) : nullptr,
                                        .low = static_cast<float>(low),
                                        .high = static_cast<float>(high)};
  OptionalTensor packed;
  if (moments == nullptr) packed = run_pack(algorithm, shape, weight);
  return run_forward(algorithm, shape, input, weight, packed, epilogue, moments);
}

std::tuple<Tensor, Tensor> conv_forward(Tensor input, Tensor weight, OptionalTensor bias,
                                        OptionalTensor residual, IntList stride, IntList padding,
                                        IntList dilation, int64_t groups, double low, double high,
                                        String algorithm, bool moments) {
  const char* op = "_conv_forward";
  const Convolution conv{stride, padding, dilation, groups};
  const IntList sizes = check_convolution(op, input, weight, bias, conv);
  check_same(op, "residual", residual, sizes, input);
  check_dtype(op, input, !moments);
  const ConvolutionShape shape = to_shape(input, weight, conv);
  const ConvolutionAlgorithm& chosen = algorithm_named(op, algorithm);
  TORCHWELD_CHECK(chosen.can_forward(shape), op, "algorithm", "one that can compute this shape",
                  algorithm);

  if (bias) bias = torch::stable::to(torch::stable::contiguous(*bias), ScalarType::Float);
  if (residual) residual = channels_last(*residual);
  BlockMoments collected;
  const auto run =
      shape.dtype == kernels::DType::bfloat16 ? forward_of<BFloat16> : forward_of<float>;
  const Tensor output =
      run(chosen, shape, input, weight, bias, residual, low, high, moments ? &collected : nullptr);
  return {output, moments ? to_tensor(collected.merged()) : nothing(input)};
}

std::tuple<Tensor, Tensor> conv_backward(Tensor grad_output, Tensor input, Tensor weight,
                                         IntList stride, IntList padding, IntList dilation,
                                         int64_t groups, String algorithm, bool input_grad,
                                         bool weight_grad) {
  const char* op = "_conv_backward";
  const Convolution conv{stride, padding, dilation, groups};
  const IntList sizes = check_convolution(op, input, weight, std::nullopt, conv);
  check_same(op, "grad_output", grad_output, sizes, input);
  check_dtype(op, input, false);
  const ConvolutionShape shape = to_shape(input, weight, conv);
  const ConvolutionAlgorithm& chosen = algorithm_named(op, algorithm);
  TORCHWELD_CHECK(chosen.can_backward(shape, input_grad, weight_grad), op, "algorithm",
                  "one that can compute this shape", algorithm);

  const Tensor g = channels_last(grad_output), x = channels_last(input), w = channels_last(weight);
  const float* gradients = g.const_data_ptr<float>();
  const Tensor grad_input = input_grad ? torch::stable::empty_like(x) : nothing(x);
  const Tensor grad_weight = weight_grad ? torch::stable::empty_like(w) : nothing(w);
  const GradientRows copy = [&](int64_t first, int64_t count, float* rows) {
    const int64_t channels = shape.out_channels;
    std::memcpy(rows, gradients + first * channels, count * channels * sizeof(float));
  };
  chosen.backward(shape,
                  {.input = x.const_data_ptr<float>(),
                   .weight = w.const_data_ptr<float>(),
                   .grad_output = copy,
                   .grad_input = input_grad ? grad_input.mutable_data_ptr<float>() : nullptr,
                   .grad_weight = weight_grad ? grad_weight.mutable_data_ptr<float>() : nullptr});
  return {grad_input, grad_weight};
}

int64_t algorithm_asked_for() { return static_cast<int64_t>(config().convolution.load()); }

}  // namespace

ConvolutionShape to_shape(const IntList& input, const Tensor& weight, const Convolution& conv) {
  return {.batch = input[0],
          .height = input[2],
          .width = input[3],
          .channels = input[1],
          .out_height = conv.output_size(0, input[2], weight.size(2)),
          .out_width = conv.output_size(1, input[3], weight.size(3)),
          .out_channels = weight.size(0),
          .kernel_height = weight.size(2),
          .kernel_width = weight.size(3),
          .stride_height = conv.stride[0],
          .stride_width = conv.stride[1],
          .padding_height = conv.padding[0],
          .padding_width = conv.padding[1],
          .dilation_height = conv.dilation[0],
          .dilation_width = conv.dilation[1],
          .groups = conv.groups,
          .dtype = *to_dtype(weight.scalar_type())};
}

ConvolutionShape to_shape(const Tensor& input, const Tensor& weight, const Convolution& conv) {
  return to_shape({input.size(0), input.size(1), input.size(2), input.size(3)}, weight, conv);
}

void ConvolutionAlgorithm::pack(const ConvolutionShape& shape, const BFloat16* weight,
                                float* packed) const {
  const std::unique_ptr<float[]> floats(new float[shape.weights()]);
  for (int64_t i = 0; i < shape.weights(); ++i) {
    floats[i] = std::bit_cast<float>(static_cast<uint32_t>(weight[i].bits) << 16);
  }
  pack(shape, floats.get(), packed);
}

Tensor run_pack(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                const Tensor& weight) {
  const Tensor packed =
      empty({1, 1, 1, algorithm.packed_size(shape)}, ScalarType::Float, MemoryFormat::Contiguous);
  const Tensor w = channels_last(weight);
  float* to = packed.mutable_data_ptr<float>();
  if (shape.dtype == kernels::DType::bfloat16) {
    algorithm.pack(shape, data<BFloat16>(w), to);
  } else {
    algorithm.pack(shape, data<float>(w), to);
  }
  return packed;
}

template <class T>
Tensor run_forward(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                   const Tensor& input, const Tensor& weight, const OptionalTensor& packed_weight,
                   const kernels::EpilogueOf<T>& epilogue, BlockMoments* moments) {
  const bool plain = std::is_same_v<T, float> && !packed_weight && algorithm.packs_itself();
  const Tensor w = plain           ? channels_last(weight)
                   : packed_weight ? *packed_weight
                                   : run_pack(algorithm, shape, weight);
  const Tensor x = channels_last(input);
  const Tensor output = empty({shape.batch, shape.out_channels, shape.out_height, shape.out_width},
                              input.scalar_type(), MemoryFormat::ChannelsLast);
  algorithm.forward(shape,
                    ConvolutionForwardOf<T>{.input = data<T>(x),
                                            .packed = plain ? nullptr : data<float>(w),
                                            .weight = plain ? data<T>(w) : nullptr,
                                            .output = static_cast<T*>(output.mutable_data_ptr()),
                                            .epilogue = epilogue,
                                            .moments = moments});
  return output;
}

template Tensor run_forward(const ConvolutionAlgorithm&, const ConvolutionShape&, const Tensor&,
                            const Tensor&, const OptionalTensor&, const kernels::Epilogue&,
                            BlockMoments*);
template Tensor run_forward(const ConvolutionAlgorithm&, const ConvolutionShape&, const Tensor&,
                            const Tensor&, const OptionalTensor&,
                            const kernels::EpilogueOf<BFloat16>&, BlockMoments*);

const ConvolutionAlgorithm* find_algorithm(std::string_view name) {
  for (const auto algorithm : {depthwise_convolution, winograd_convolution, dense_convolution}) {
    if (algorithm().name() == name) return &algorithm();
  }
  return nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(torchweld, CompositeExplicitAutograd, m) {
  m.impl("_convolution_algorithm", TORCH_BOX(&algorithm_asked_for));
}

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("_conv_forward", TORCH_BOX(&conv_forward));
  m.impl("_conv_backward", TORCH_BOX(&conv_backward));
}

}  // namespace torchweld::ops
