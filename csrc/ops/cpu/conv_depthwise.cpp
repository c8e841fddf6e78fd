#include <algorithm>
#include <numeric>

#include "ops/cpu/convolution.h"
#include "ops/kernels.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace {

using kernels::DepthwiseAhead;
using kernels::DepthwiseForward;
using kernels::DepthwiseWeightGradient;
using kernels::kDepthwiseGroup;

using Shape = ConvolutionShape;

// Floats of output a task computes: large enough to hide what a task costs, small enough for the
// statistics to find them in the second cache level.
constexpr int64_t kTaskSize = 1 << 15;
constexpr int64_t kMaxRows = 64;  // of a kernel: pointers on the stack

int64_t groups(const Shape& s) { return (s.channels + kDepthwiseGroup - 1) / kDepthwiseGroup; }

// Along one axis: the taps that meet input pixel i when output pixel o is computed are
// o * stride - padding + tap * dilation = i.
struct Axis {
  int64_t size, out_size, kernel, stride, padding, dilation;

  // The input pixel of a tap, which may lie outside.
  int64_t input(int64_t out, int64_t tap) const { return out * stride - padding + tap * dilation; }
  bool inside(int64_t pixel) const { return pixel >= 0 && pixel < size; }
};

Axis vertical(const Shape& s) {
  return {s.height,        s.out_height,     s.kernel_height,
          s.stride_height, s.padding_height, s.dilation_height};
}

[[maybe_unused]] Axis horizontal(const Shape& s) {
  return {s.width, s.out_width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width};
}

// --- forward -------------------------------------------------------------------------------------
class Forward {
 public:
  Forward(const Shape& shape, const ConvolutionForward& pass)
      : shape_(shape),
        pass_(pass),
        row_(shape.out_width * shape.channels),
        input_row_(shape.width * shape.channels),
        rows_(std::clamp<int64_t>(kTaskSize / std::max<int64_t>(1, row_), 1,
                                  std::max<int64_t>(1, shape.out_height))),
        blocks_((shape.out_height + rows_ - 1) / rows_) {}

  void run() const {
    const int64_t tasks = shape_.batch * blocks_;
    if (pass_.moments) pass_.moments->start(tasks, shape_.channels);
    const int64_t grain = std::max<int64_t>(1, kTaskSize / std::max<int64_t>(1, rows_ * row_));
    parallel_for(tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) block(task);
    });
  }

 private:
  void block(int64_t task) const {
    const int64_t image = task / blocks_;
    const int64_t first = task % blocks_ * rows_;
    const int64_t last = std::min(first + rows_, shape_.out_height);
    for (int64_t p = first; p < last; ++p) row(image, p);
    if (pass_.moments) {
      pass_.moments->add(task, pass_.output + (image * shape_.out_height + first) * row_,
                         (last - first) * shape_.out_width, shape_.channels, 0, shape_.channels);
    }
  }

  void row(int64_t image, int64_t p) const {
    const Axis axis = vertical(shape_);
    const int64_t taps = shape_.kernel_width;
    const float *input[kMaxRows], *weight[kMaxRows];
    int64_t count = 0;
    for (int64_t r = 0; r < axis.kernel; ++r) {
      const int64_t h = axis.input(p, r);
      if (!axis.inside(h)) continue;
      input[count] = pass_.input + (image * shape_.height + h) * input_row_;
      weight[count++] = pass_.packed + r * taps * kDepthwiseGroup;
    }
    const int64_t out = (image * shape_.out_height + p) * row_;
    DepthwiseForward d{};
    d.taps = {.input = input,
              .rows = count,
              .taps = taps,
              .width = shape_.width,
              .first = -shape_.padding_width,
              .step = shape_.stride_width,
              .tap_step = shape_.dilation_width,
              .channels = shape_.channels};
    d.weight = weight;
    d.weight_group = axis.kernel * taps * kDepthwiseGroup;
    d.output = pass_.output + out;
    d.output_width = shape_.out_width;
    d.output_step = shape_.channels;
    d.epilogue = pass_.epilogue;
    if (d.epilogue.residual) d.epilogue.residual += out;
    d.input_ahead = input_ahead(image, axis.input(p, axis.kernel - 1) + 1);
    const int64_t outputs = shape_.batch * shape_.out_height * row_;
    d.output_ahead = {d.output + row_, std::min(row_, outputs - out - row_)};
    cpu_kernels().depthwise->forward(d);
  }

  // What the next row of output needs that this one did not: as many input rows as the stride.
  DepthwiseAhead input_ahead(int64_t image, int64_t h) const {
    const int64_t end = shape_.batch * shape_.height;
    const int64_t first = std::clamp<int64_t>(image * shape_.height + h, 0, end);
    const int64_t count = std::min(shape_.stride_height, end - first);
    return {pass_.input + first * input_row_, count * input_row_};
  }

  const Shape& shape_;
  const ConvolutionForward& pass_;
  int64_t row_, input_row_;  // floats of a row
  int64_t rows_, blocks_;    // of a task, and tasks of an image
};

class Depthwise final : public ConvolutionAlgorithm {
 public:
  const char* name() const override { return "depthwise"; }

  bool can_forward(const Shape& s) const override {
    return s.groups == s.channels && s.out_channels == s.channels && s.kernel_height <= kMaxRows;
  }
  bool can_backward(const Shape&, bool, bool) const override { return false; }

  int64_t packed_size(const Shape& s) const override {
    return groups(s) * s.kernel_height * s.kernel_width * kDepthwiseGroup;
  }

  void pack(const Shape& s, const float* weight, float* packed) const override {
    const int64_t taps = s.kernel_height * s.kernel_width;
    for (int64_t c = 0; c < groups(s) * kDepthwiseGroup; ++c) {
      float* to = packed + c / kDepthwiseGroup * taps * kDepthwiseGroup + c % kDepthwiseGroup;
      for (int64_t t = 0; t < taps; ++t) {
        to[t * kDepthwiseGroup] = c < s.channels ? weight[c * taps + t] : 0;
      }
    }
  }

  void forward(const Shape& shape, const ConvolutionForward& pass) const override {
    Forward(shape, pass).run();
  }
  void backward(const Shape&, const ConvolutionBackward&) const override {}
};

}  // namespace

const ConvolutionAlgorithm& depthwise_convolution() {
  static const Depthwise algorithm;
  return algorithm;
}

}  // namespace torchweld::ops
