#include "ops/max_pool2d.h"

#include "ops/check.h"

namespace torchweld::ops {
namespace {

// As ATen reads them, one number is that of rows and columns.
IntList to_pair(IntList values) {
  if (values.size() == 1) values.push_back(values[0]);
  return values;
}

void check_pair(const char* op, const char* argument, const IntList& values, int64_t least) {
  const bool pair = values.size() == 2;
  TORCHWELD_CHECK(pair, op, argument, "2 integers", values.size());
  for (const int64_t value : values) {
    TORCHWELD_CHECK(value >= least, op, argument, "integers of at least " << least, value);
  }
}

}  // namespace

MaxPool2d::MaxPool2d(const char* op, IntList kernel_size, IntList stride, IntList padding,
                     IntList dilation, bool ceil_mode)
    : op(op),
      kernel(to_pair(std::move(kernel_size))),
      stride(stride.empty() ? kernel : to_pair(std::move(stride))),
      padding(to_pair(std::move(padding))),
      dilation(to_pair(std::move(dilation))),
      ceil_mode(ceil_mode) {
  check_pair(op, "kernel_size", kernel, 1);
  check_pair(op, "stride", this->stride, 1);
  check_pair(op, "padding", this->padding, 0);
  check_pair(op, "dilation", this->dilation, 1);
  for (size_t i = 0; i < 2; ++i) {
    TORCHWELD_CHECK(this->padding[i] <= kernel[i] / 2, op, "padding",
                    "at most " << kernel[i] / 2 << ", half of the window", this->padding[i]);
  }
}

int64_t MaxPool2d::output_size(int axis, int64_t size) const {
  const size_t i = static_cast<size_t>(axis);
  const int64_t left = size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
  TORCHWELD_CHECK(left + (ceil_mode ? stride[i] - 1 : 0) >= 0, op, "input",
                  "a padded " << (i ? "width" : "height") << " of at least the window's "
                              << dilation[i] * (kernel[i] - 1) + 1,
                  size + 2 * padding[i]);
  int64_t count = (left + (ceil_mode ? stride[i] - 1 : 0)) / stride[i] + 1;
  // The last window must not begin in the padding on the right.
  if (ceil_mode && (count - 1) * stride[i] >= size + padding[i]) --count;
  return count;
}

void check_max_pool2d(const MaxPool2d& pool, const Tensor& input) {
  bool fits = input.dim() == 3 || input.dim() == 4;
  for (int64_t d = input.dim() == 4; fits && d < input.dim(); ++d) fits = input.size(d) > 0;
  TORCHWELD_CHECK(fits, pool.op, "input", "[N, C, H, W] or [C, H, W], of which N alone may be 0",
                  shape_string(input));
  pool.output_size(0, input.size(input.dim() - 2));
  pool.output_size(1, input.size(input.dim() - 1));
}

Tensor aten::max_pool2d(const Tensor& input, const MaxPool2d& pool) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(input),        from(pool.kernel),   from(pool.stride),
                                    from(pool.padding), from(pool.dilation), from(pool.ceil_mode)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::max_pool2d", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace torchweld::ops
