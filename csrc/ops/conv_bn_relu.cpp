#include "ops/conv_bn_relu.h"

#include "ops/check.h"

namespace torchweld::ops {

using torch::headeronly::MemoryFormat;

namespace {

std::string shape_string(const IntList& shape) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << ']';
  return out.str();
}

void check_pair(const char* op, const char* argument, const IntList& values, int64_t least) {
  TORCHWELD_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, argument,
                  "2 integers of at least " << least, shape_string(values));
}

void check_device(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  TORCHWELD_CHECK(tensor.device() == like.device(), op, argument,
                  "a tensor on the device of the others", "one on another device");
}

// Throws unless the tensor, if there is one, has `channels` elements on the device of `like`, of a
// dtype batch norm mixes with it: its own, or float32 beside a 16-bit one.
void check_channels(const char* op, const char* argument, const OptionalTensor& tensor,
                    int64_t channels, const Tensor& like) {
  if (!tensor) return;
  TORCHWELD_CHECK(tensor->dim() == 1 && tensor->size(0) == channels, op, argument,
                  "shape [" << channels << "], one value per channel", ops::shape_string(*tensor));
  const ScalarType type = like.scalar_type();
  const bool half = type == ScalarType::BFloat16 || type == ScalarType::Half;
  TORCHWELD_CHECK(
      tensor->scalar_type() == type || (half && tensor->scalar_type() == ScalarType::Float), op,
      argument, dtype_name(type) << (half ? " or float32" : ""), dtype_name(tensor->scalar_type()));
  check_device(op, argument, *tensor, like);
}

// Throws unless the tensor holds `size` float64 on the device of `like`.
void check_doubles(const char* op, const char* argument, const Tensor& tensor, int64_t size,
                   const Tensor& like) {
  TORCHWELD_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 &&
                      tensor.size(0) == size && tensor.is_contiguous(),
                  op, argument, "a contiguous float64 tensor of shape [" << size << "]",
                  dtype_name(tensor.scalar_type()) << " of shape " << ops::shape_string(tensor));
  check_device(op, argument, tensor, like);
}

void check_batch_norm(const char* op, const BatchNormArguments& bn, const IntList& shape,
                      const Tensor& like) {
  check_channels(op, "bn_weight", bn.weight, shape[1], like);
  check_channels(op, "bn_bias", bn.bias, shape[1], like);
  check_same(op, "residual", bn.residual, shape, like);
  to_activation(op, bn.activation);
}

}  // namespace

kernels::Activation to_activation(const char* op, const std::string& name) {
  using kernels::Activation;
  if (name == "identity") return Activation::identity;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  if (name == "leaky_relu") return Activation::leaky_relu;
  if (name == "silu") return Activation::silu;
  TORCHWELD_CHECK(name == "hardswish", op, "activation",
                  "identity, relu, relu6, leaky_relu, silu or hardswish", '"' << name << '"');
  return Activation::hardswish;
}

void check_activations(const char* op, const char* argument, const Tensor& x) {
  TORCHWELD_CHECK(x.dim() == 4, op, argument, "4 dimensions [N, C, H, W]", ops::shape_string(x));
  TORCHWELD_CHECK(to_dtype(x.scalar_type()), op, argument, "float32, float64, bfloat16 or float16",
                  dtype_name(x.scalar_type()));
}

void check_same(const char* op, const char* argument, const OptionalTensor& tensor,
                const IntList& shape, const Tensor& like) {
  if (!tensor) return;
  TORCHWELD_CHECK(has_shape(*tensor, shape), op, argument, "shape " << shape_string(shape),
                  ops::shape_string(*tensor));
  TORCHWELD_CHECK(tensor->scalar_type() == like.scalar_type(), op, argument,
                  dtype_name(like.scalar_type()), dtype_name(tensor->scalar_type()));
  check_device(op, argument, *tensor, like);
}

void check_weight(const char* op, const Tensor& weight, const Convolution& conv) {
  check_pair(op, "stride", conv.stride, 1);
  check_pair(op, "padding", conv.padding, 0);
  check_pair(op, "dilation", conv.dilation, 1);
  TORCHWELD_CHECK(weight.dim() == 4 && weight.numel() > 0, op, "weight",
                  "a non-empty [out_channels, in_channels / groups, kH, kW]",
                  ops::shape_string(weight));
  TORCHWELD_CHECK(conv.groups > 0 && weight.size(0) % conv.groups == 0, op, "groups",
                  "a divisor of the " << weight.size(0) << " output channels", conv.groups);
}

IntList check_convolution(const char* op, const Tensor& input, const Tensor& weight,
                          const OptionalTensor& bias, const Convolution& conv) {
  check_activations(op, "input", input);
  check_weight(op, weight, conv);
  TORCHWELD_CHECK(input.size(1) == weight.size(1) * conv.groups, op, "input",
                  weight.size(1) * conv.groups << " channels, as weight "
                                               << ops::shape_string(weight) << " with groups "
                                               << conv.groups << " has",
                  ops::shape_string(input));
  check_same(op, "weight", weight, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)},
             input);
  check_same(op, "bias", bias, {weight.size(0)}, input);

  IntList shape{input.size(0), weight.size(0)};
  for (int i = 0; i < 2; ++i) {
    const int64_t padded = input.size(2 + i) + 2 * conv.padding[i];
    const int64_t kernel = conv.dilation[i] * (weight.size(2 + i) - 1) + 1;
    TORCHWELD_CHECK(
        padded >= kernel, op, "input",
        "a padded " << (i ? "width" : "height") << " of at least the kernel's " << kernel, padded);
    shape.push_back(conv.output_size(i, input.size(2 + i), weight.size(2 + i)));
  }
  return shape;
}

IntList check_conv_bn_relu(const char* op, const Tensor& input, const Tensor& weight,
                           const OptionalTensor& bias, const BatchNormArguments& bn,
                           const Convolution& conv) {
  const IntList shape = check_convolution(op, input, weight, bias, conv);
  check_batch_norm(op, bn, shape, input);
  return shape;
}

void check_conv_bn_relu_backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                 const Tensor& weight, const BatchNormArguments& bn,
                                 const Tensor& conv_output, const Convolution& conv,
                                 const std::vector<bool>& output_mask) {
  const IntList shape = check_conv_bn_relu(op, input, weight, std::nullopt, bn, conv);
  check_same(op, "conv_output", conv_output, shape, input);
  check_same(op, "grad_output", grad_output, shape, input);
  TORCHWELD_CHECK(output_mask.size() == 6, op, "output_mask", "6 values", output_mask.size());
}

void check_statistics(const char* op, const Tensor& mean, const Tensor& invstd, int64_t channels,
                      const Tensor& like) {
  check_doubles(op, "mean", mean, channels, like);
  check_doubles(op, "invstd", invstd, channels, like);
}

void check_running(const char* op, const Tensor& running_mean, const Tensor& running_var,
                   int64_t channels, const Tensor& like) {
  check_channels(op, "running_mean", running_mean, channels, like);
  check_channels(op, "running_var", running_var, channels, like);
}

void check_batch_norm_relu(const char* op, const Tensor& input, const Tensor& mean,
                           const Tensor& invstd, const BatchNormArguments& bn) {
  check_activations(op, "input", input);
  check_statistics(op, mean, invstd, input.size(1), input);
  check_batch_norm(op, bn, shape_of(input), input);
}

void check_batch_norm_relu_backward(const char* op, const Tensor& grad_output, const Tensor& input,
                                    const Tensor& mean, const Tensor& invstd,
                                    const BatchNormArguments& bn) {
  check_batch_norm_relu(op, input, mean, invstd, bn);
  check_same(op, "grad_output", grad_output, shape_of(input), input);
}

void check_sums(const char* op, const Tensor& sum_g, const Tensor& sum_g_xhat, const Tensor& count,
                const Tensor& input) {
  check_doubles(op, "sum_g", sum_g, input.size(1), input);
  check_doubles(op, "sum_g_xhat", sum_g_xhat, input.size(1), input);
  check_doubles(op, "count", count, 1, input);
}

void check_running_stats(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean,
                         const Tensor& var, int64_t count) {
  const char* op = "update_running_stats";
  TORCHWELD_CHECK(mean.dim() == 1, op, "mean", "1 dimension", ops::shape_string(mean));
  const int64_t channels = mean.size(0);
  check_doubles(op, "mean", mean, channels, mean);
  check_doubles(op, "var", var, channels, mean);
  for (const Tensor* running : {&running_mean, &running_var}) {
    const char* argument = running == &running_mean ? "running_mean" : "running_var";
    TORCHWELD_CHECK(to_dtype(running->scalar_type()), op, argument,
                    "float32, float64, bfloat16 or float16", dtype_name(running->scalar_type()));
    TORCHWELD_CHECK(running->dim() == 1 && running->size(0) == channels && running->is_contiguous(),
                    op, argument, "a contiguous [" << channels << "]", ops::shape_string(*running));
    check_device(op, argument, *running, mean);
  }
  TORCHWELD_CHECK(count == 0 || count > 1, op, "count",
                  "more than 1 value per channel, for the unbiased variance, or 0", count);
}

IntList shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

MemoryFormat format_of(const Tensor& x) {
  return x.is_contiguous() ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
}

// As c10::is_channels_last_strides_2d.
bool suggests_channels_last(const Tensor& x) {
  int64_t least = 0;
  if (x.stride(1) == 0) return false;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) == 0 || x.stride(d) < least) return false;
    if (d == 0 && least == x.stride(1)) return false;
    least = x.stride(d);
    if (x.size(d) > 1) least *= x.size(d);
  }
  return true;
}

Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  return torch::stable::contiguous(
      x, x.stride(1) == 1 ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor laid_out_as(const Tensor& x, const Tensor& tensor) {
  return torch::stable::contiguous(tensor, format_of(x));
}

Tensor to_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

Tensor channels_last(const Tensor& x) {
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != stride)
      return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    stride *= x.size(d);
  }
  return x;
}

Tensor nothing(const Tensor& like) {
  const int64_t size = 0;
  return torch::stable::new_empty(like, {&size, 1});
}

}  // namespace torchweld::ops
