#include "ops/cpu/conv_depthwise.h"

#include "ops/kernels.h"
#include "ops/parallel.h"

namespace torchweld::ops {
namespace {

using namespace depthwise;
using kernels::DepthwiseForward;
using kernels::DepthwiseForwardOf;

// Blocks at least, where there are as many rows: for batches of one.
constexpr int64_t kBlocks = 16;

void run(const DepthwiseForward& d) { cpu_kernels().depthwise->forward(d); }
void run(const DepthwiseForwardOf<BFloat16>& d) { cpu_kernels().depthwise->forward_bf16(d); }

template <class T>
void forward_block(const Shape& s, const ConvolutionForwardOf<T>& pass, int64_t image,
                   int64_t first, int64_t count) {
  const InputRows rows(s, pass.input, image, first, count);
  const int64_t begin = (image * s.out_height + first) * output_row(s);
  const int64_t next = begin + count * output_row(s);
  const int64_t end = s.batch * s.out_height * output_row(s);
  DepthwiseForwardOf<T> d{};
  d.taps = rows.taps(s);
  d.weight = pass.packed;
  d.output = pass.output + begin;
  d.height = count;
  d.width = s.out_width;
  d.output_row = output_row(s);
  d.output_step = s.channels;
  d.epilogue = pass.epilogue;
  if (d.epilogue.residual) d.epilogue.residual += begin;
  d.input_ahead = input_of(s, pass.input, image, first + count, count);
  d.output_ahead = {pass.output + next,
                    std::min(next - begin, end - next) * static_cast<int64_t>(sizeof(T))};
  run(d);
}

template <class T>
void forward_pass(const Shape& s, const ConvolutionForwardOf<T>& pass) {
  const int64_t fit = rows_per_block(s, s.stride_height * input_row(s));
  const int64_t share = std::max<int64_t>(1, divide_up(s.batch * s.out_height, kBlocks));
  const int64_t blocks = divide_up(s.out_height, std::min(fit, share));
  const int64_t rows = divide_up(s.out_height, blocks);
  if (pass.moments) pass.moments->start(s.batch * blocks, s.channels);
  const int64_t grain = kBlockSize / (4 * rows * output_row(s)) + 1;
  parallel_for(s.batch * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * rows;
      const int64_t count = std::min(rows, s.out_height - first);
      forward_block(s, pass, image, first, count);
      if constexpr (std::is_same_v<T, float>) {
        if (!pass.moments) continue;
        const float* out = pass.output + (image * s.out_height + first) * output_row(s);
        pass.moments->add(task, out, count * s.out_width, s.channels, 0, s.channels);
      }
    }
  });
}

class Depthwise final : public ConvolutionAlgorithm {
 public:
  const char* name() const override { return "depthwise"; }

  bool can_forward(const Shape& s) const override {
    return s.groups == s.channels && s.out_channels == s.channels;
  }
  bool can_backward(const Shape& s, bool, bool) const override { return can_forward(s); }

  int64_t packed_size(const Shape& s) const override { return depthwise::packed_size(s); }

  using ConvolutionAlgorithm::pack;
  void pack(const Shape& s, const float* weight, float* packed) const override {
    for (int64_t c = 0; c < groups(s) * kDepthwiseGroup; ++c) {
      float* to = packed + c / kDepthwiseGroup * taps(s) * kDepthwiseGroup + c % kDepthwiseGroup;
      for (int64_t t = 0; t < taps(s); ++t) {
        to[t * kDepthwiseGroup] = c < s.channels ? weight[c * taps(s) + t] : 0;
      }
    }
  }

  void forward(const Shape& shape, const ConvolutionForward& pass) const override {
    forward_pass(shape, pass);
  }
  void forward(const Shape& shape, const ConvolutionForwardOf<BFloat16>& pass) const override {
    forward_pass(shape, pass);
  }
  void backward(const Shape& shape, const ConvolutionBackward& pass) const override {
    depthwise::backward(shape, pass);
  }
};

}  // namespace

const ConvolutionAlgorithm& depthwise_convolution() {
  static const Depthwise algorithm;
  return algorithm;
}

}  // namespace torchweld::ops
