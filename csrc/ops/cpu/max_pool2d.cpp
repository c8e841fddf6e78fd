#include "ops/max_pool2d.h"

#include <numeric>

#include "ops/check.h"
#include "ops/divide.h"
#include "ops/kernels.h"
#include "ops/memory.h"
#include "ops/parallel.h"

namespace torchweld::ops {
namespace {

using kernels::BFloat16;
using kernels::MaxPool2dOf;
using kernels::PoolAxis;
using kernels::PoolRun;
using torch::headeronly::MemoryFormat;

// Bytes of a task: a part of the second cache level.
constexpr int64_t kTaskSize = 1 << 18;

// The runs of one axis, and where they lie.
class Axis {
 public:
  Axis(const MaxPool2d& pool, size_t i, int64_t step, int64_t tap_step)
      : axis_{nullptr,         step, tap_step, pool.kernel[i], pool.stride[i], pool.padding[i],
              pool.dilation[i]} {}

  void add(const PoolRun& run) { runs_.push_back(run); }

  PoolAxis get() const {
    PoolAxis axis = axis_;
    axis.runs = runs_.data();
    return axis;
  }

 private:
  PoolAxis axis_;
  std::vector<PoolRun> runs_;
};

// Which pixels of the input lie under each window.
Axis windows(const MaxPool2d& pool, size_t i, int64_t size, int64_t outputs) {
  const int64_t dilation = pool.dilation[i], taps = pool.kernel[i];
  Axis axis(pool, i, dilation, 1);
  for (int64_t out = 0; out < outputs; ++out) {
    const int64_t begin = out * pool.stride[i] - pool.padding[i];
    const int64_t tap = begin < 0 ? divide_up(-begin, dilation) : 0;
    const int64_t end = begin < size ? std::min(taps, divide_up(size - begin, dilation)) : 0;
    axis.add({begin + tap * dilation, std::max<int64_t>(0, end - tap), tap});
  }
  return axis;
}

// Which windows cover each pixel of the input.
Axis covers(const MaxPool2d& pool, size_t i, int64_t size, int64_t outputs) {
  const int64_t stride = pool.stride[i], dilation = pool.dilation[i], taps = pool.kernel[i];
  // Windows that have a pixel in common may meet it between two of their taps.
  const int64_t step = dilation / std::gcd(stride, dilation);
  const int64_t tap_step = step * stride / dilation;
  Axis axis(pool, i, step, -tap_step);
  for (int64_t in = 0; in < size; ++in) {
    const int64_t place = in + pool.padding[i];
    int64_t out = std::max<int64_t>(0, divide_up(place - (taps - 1) * dilation, stride));
    while (out * stride <= place && (place - out * stride) % dilation != 0) ++out;
    const int64_t tap = (place - out * stride) / dilation;
    const bool any = out < outputs && out * stride <= place;
    const int64_t most = any ? std::min((outputs - 1 - out) / step, tap / tap_step) + 1 : 0;
    axis.add({out, most, tap});
  }
  return axis;
}

// f(image, first row, end) over all rows of all images.
template <class F>
void for_each_block(int64_t images, int64_t height, int64_t row_bytes, const F& f) {
  const int64_t fit = std::clamp<int64_t>(kTaskSize / std::max<int64_t>(1, row_bytes), 1, height);
  const int64_t blocks = divide_up(height, fit);
  const int64_t grain = divide_up(kTaskSize, std::max<int64_t>(1, fit * row_bytes));
  parallel_for(images * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * fit;
      f(task / blocks, first, std::min(height, first + fit));
    }
  });
}

void run(const MaxPool2dOf<float>& d, uint8_t* positions) {
  cpu_kernels().max_pool2d->forward(d, positions);
}
void run(const MaxPool2dOf<BFloat16>& d, uint8_t* positions) {
  cpu_kernels().max_pool2d->forward_bf16(d, positions);
}
void run_backward(const MaxPool2dOf<float>& d, const uint8_t* positions) {
  cpu_kernels().max_pool2d->backward(d, positions);
}
void run_backward(const MaxPool2dOf<BFloat16>& d, const uint8_t* positions) {
  cpu_kernels().max_pool2d->backward_bf16(d, positions);
}

template <class T>
void forward(const Tensor& input, const MaxPool2d& pool, Tensor& output, Tensor* positions) {
  const int64_t channels = input.size(1), height = input.size(2), width = input.size(3);
  const int64_t out_height = output.size(2), out_width = output.size(3);
  const Axis rows = windows(pool, 0, height, out_height);
  const Axis columns = windows(pool, 1, width, out_width);
  const T* from = static_cast<const T*>(input.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  uint8_t* bytes = positions ? positions->mutable_data_ptr<uint8_t>() : nullptr;
  const int64_t row_bytes = pool.stride[0] * width * channels * static_cast<int64_t>(sizeof(T));
  for_each_block(input.size(0), out_height, row_bytes, [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t image = n * out_height * out_width * channels;
    run(MaxPool2dOf<T>{.rows = rows.get(),
                       .columns = columns.get(),
                       .begin = begin,
                       .end = end,
                       .width = out_width,
                       .source_width = width,
                       .channels = channels,
                       .source = from + n * height * width * channels,
                       .destination = to + image},
        bytes ? bytes + image : nullptr);
  });
}

template <class T>
void backward(const Tensor& grad_output, const Tensor& positions, const MaxPool2d& pool,
              Tensor& grad_input) {
  const int64_t channels = grad_input.size(1), height = grad_input.size(2);
  const int64_t width = grad_input.size(3);
  const int64_t out_height = grad_output.size(2), out_width = grad_output.size(3);
  const Axis rows = covers(pool, 0, height, out_height);
  const Axis columns = covers(pool, 1, width, out_width);
  const T* from = static_cast<const T*>(grad_output.const_data_ptr());
  T* to = static_cast<T*>(grad_input.mutable_data_ptr());
  const uint8_t* bytes = positions.const_data_ptr<uint8_t>();
  const int64_t row_bytes = width * channels * static_cast<int64_t>(sizeof(T));
  for_each_block(grad_input.size(0), height, row_bytes, [&](int64_t n, int64_t begin, int64_t end) {
    const int64_t image = n * out_height * out_width * channels;
    run_backward(MaxPool2dOf<T>{.rows = rows.get(),
                                .columns = columns.get(),
                                .begin = begin,
                                .end = end,
                                .width = width,
                                .source_width = out_width,
                                .channels = channels,
                                .source = from + image,
                                .destination = to + n * height * width * channels},
                 bytes + image);
  });
}

bool is_pooled_type(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16;
}

bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t dense = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != dense) return false;
    dense *= x.size(d);
  }
  return true;
}

bool has_kernel(const MaxPool2d& pool, const Tensor& input) {
  return pool.taps() <= kernels::kMostPoolTaps && input.dim() == 4 &&
         is_pooled_type(input.scalar_type()) && is_channels_last(input);
}

// An input pixel looks at every window that covers it, which stock's backward does not.
bool is_fast(const MaxPool2d& pool) { return pool.taps() <= 32 * pool.stride[0] * pool.stride[1]; }

Tensor pooled(const Tensor& input, const MaxPool2d& pool, Tensor* positions) {
  const IntList shape{input.size(0), input.size(1), pool.output_size(0, input.size(2)),
                      pool.output_size(1, input.size(3))};
  Tensor output = empty(shape, input.scalar_type(), MemoryFormat::ChannelsLast);
  if (positions) *positions = empty(shape, ScalarType::Byte, MemoryFormat::ChannelsLast);
  if (output.numel() == 0) return output;
  if (input.scalar_type() == ScalarType::Float) {
    forward<float>(input, pool, output, positions);
  } else {
    forward<BFloat16>(input, pool, output, positions);
  }
  return output;
}

Tensor max_pool2d(Tensor input, IntList kernel_size, IntList stride, IntList padding,
                  IntList dilation, bool ceil_mode) {
  const NoGradGuard no_grad;
  const MaxPool2d pool("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
  check_max_pool2d(pool, input);
  return has_kernel(pool, input) && is_fast(pool) ? pooled(input, pool, nullptr)
                                                  : aten::max_pool2d(input, pool);
}

std::tuple<Tensor, Tensor> max_pool2d_with_positions(Tensor input, IntList kernel_size,
                                                     IntList stride, IntList padding,
                                                     IntList dilation, bool ceil_mode) {
  const MaxPool2d pool("max_pool2d_with_positions", kernel_size, stride, padding, dilation,
                       ceil_mode);
  check_max_pool2d(pool, input);
  TORCHWELD_CHECK(has_kernel(pool, input), pool.op, "input",
                  "float32 or bfloat16 [N, C, H, W] in channels_last memory and a window of at "
                  "most 256 taps",
                  describe(input) << " and one of " << pool.kernel[0] << " x " << pool.kernel[1]);
  Tensor positions;
  Tensor output = pooled(input, pool, &positions);
  return {output, positions};
}

Tensor max_pool2d_backward(Tensor grad_output, Tensor positions, int64_t height, int64_t width,
                           IntList kernel_size, IntList stride, IntList padding, IntList dilation) {
  const char* op = "max_pool2d_backward";
  const MaxPool2d pool(op, kernel_size, stride, padding, dilation, false);
  TORCHWELD_CHECK(grad_output.dim() == 4 && is_pooled_type(grad_output.scalar_type()), op,
                  "grad_output", "float32 or bfloat16 [N, C, H, W]", describe(grad_output));
  TORCHWELD_CHECK(positions.scalar_type() == ScalarType::Byte && positions.dim() == 4 &&
                      same_shape(positions, grad_output),
                  op, "positions", "uint8 " << shape_string(grad_output), describe(positions));
  TORCHWELD_CHECK(height >= 1 && width >= 1, op, "height", "a height and a width of at least 1",
                  height << " and " << width);
  Tensor grad_input = empty({grad_output.size(0), grad_output.size(1), height, width},
                            grad_output.scalar_type(), MemoryFormat::ChannelsLast);
  if (grad_input.numel() == 0) return grad_input;
  const auto dense = [](const Tensor& x) {
    return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  };
  if (grad_output.scalar_type() == ScalarType::Float) {
    backward<float>(dense(grad_output), dense(positions), pool, grad_input);
  } else {
    backward<BFloat16>(dense(grad_output), dense(positions), pool, grad_input);
  }
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_with_positions", TORCH_BOX(&max_pool2d_with_positions));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
}

}  // namespace torchweld::ops
