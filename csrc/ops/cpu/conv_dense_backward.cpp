// Both gradients from one visit to the gradient of the output, a chunk at a time: the rows of a
// chunk lie in scratch that stays in cache, and the input gradient is a dense forward over them.
#include <cstring>
#include <deque>
#include <optional>

#include "ops/cpu/conv_dense.h"
#include "ops/cpu/conv_dense_spread.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops::dense {
namespace {

using kernels::kPanel;

// Floats of a chunk that is one block, and its fewest and most pixels: a weight gradient is one
// chain of additions within a block.
constexpr int64_t kChunkSize = 1 << 16;
constexpr int64_t kMinPixels = 96;
constexpr int64_t kMaxPixels = 128;
// Partial weight gradients: at most so many, as long as they have so many floats together.
constexpr int64_t kMaxTasks = 32;
constexpr int64_t kMinTasks = 4;
constexpr int64_t kPartialsSize = 1 << 21;
// Additions that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

// Along one axis, the input pixels first, first + stride, ... and the kernel taps that reach them.
// Over the output's gradient these taps, in reverse, are a convolution of stride 1.
struct Phase {
  int64_t tap, taps;
  int64_t first, count;
  int64_t padding;
};

std::vector<Phase> phases(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                          int64_t dilation) {
  std::vector<Phase> result;
  for (int64_t tap = 0; tap < std::min(stride, kernel); ++tap) {
    const int64_t taps = (kernel - 1 - tap) / stride + 1;
    const int64_t skipped = padding > tap ? divide_up(padding - tap, stride) : 0;
    const int64_t first = tap - padding + stride * skipped;
    if (first >= size) continue;
    result.push_back(
        {tap, taps, first, (size - 1 - first) / stride + 1, (taps - 1) * dilation - skipped});
  }
  return result;
}

// The gradient of the input, or of the pixels of one phase in it.
class InputGradient {
 public:
  InputGradient(const ConvolutionShape& s, const Phase& vertical, const Phase& horizontal,
                const float* weight)
      : shape_(s),
        offset_((vertical.first * s.width + horizontal.first) * s.channels),
        strided_(s.stride_height > 1 || s.stride_width > 1),
        target_{nullptr, 0, s.stride_height * s.width * s.channels, s.stride_width * s.channels},
        packed_(packed_size(s.channels, vertical.taps * horizontal.taps * s.out_channels)) {
    shape_.batch = 1;
    shape_.height = s.out_height;
    shape_.width = s.out_width;
    shape_.channels = s.out_channels;
    shape_.out_height = vertical.count;
    shape_.out_width = horizontal.count;
    shape_.out_channels = s.channels;
    shape_.kernel_height = vertical.taps;
    shape_.kernel_width = horizontal.taps;
    shape_.stride_height = shape_.stride_width = 1;
    shape_.padding_height = vertical.padding;
    shape_.padding_width = horizontal.padding;
    pack(s, vertical, horizontal, weight);
  }

  // From the gradient of one image's output, or of a run of `pixels` where pixels are independent.
  void compute(const float* gradient, int64_t pixels, float* grad_input,
               kernels::Ahead& ahead) const {
    ConvolutionShape shape = shape_;
    if (pixels > 0) {
      shape.height = shape.out_height = 1;
      shape.width = shape.out_width = pixels;
    }
    const int64_t wish = std::max(kMinPixels, (1 << 14) / shape.out_channels);
    const Plan plan(shape, {.pixels = wish, .regroup = !strided_});
    Target<float> target = target_;
    target.data = grad_input + offset_;
    Windows windows(plan, gradient);
    for (int64_t i = 0; i < plan.blocks(); ++i) {
      const Block block = plan.block(i);
      windows.move_to(block);
      forward_block(plan, windows, block, packed_.data(), target, {}, 0,
                    panels_of(shape.out_channels), &ahead);
    }
  }

 private:
  // Panels over the input's channels, whose rows are contiguous in the weight.
  void pack(const ConvolutionShape& s, const Phase& vertical, const Phase& horizontal,
            const float* weight) {
    const int64_t taps = vertical.taps * horizontal.taps, steps = taps * s.out_channels;
    parallel_for(panels_of(s.channels) * taps, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / taps, column = panel * kPanel, tap = taps - 1 - i % taps;
        const int64_t r = vertical.tap + tap / horizontal.taps * s.stride_height;
        const int64_t q = horizontal.tap + tap % horizontal.taps * s.stride_width;
        const int64_t width = panel_width(s.channels, panel);
        const int64_t columns = std::min(kPanel, s.channels - column);
        float* to = packed_.data() + column * steps + i % taps * s.out_channels * width;
        for (int64_t k = 0; k < s.out_channels; ++k, to += width) {
          const float* from =
              weight + ((k * s.kernel_height + r) * s.kernel_width + q) * s.channels + column;
          std::memcpy(to, from, columns * sizeof(float));
          std::fill(to + columns, to + width, 0.0f);
        }
      }
    });
  }

  ConvolutionShape shape_;
  int64_t offset_;
  bool strided_;
  Target<float> target_;
  Scratch packed_;
};

// Adds a block's part to a partial weight gradient [run][depth][out_channels], or starts it.
void weight_gradient(const Plan& plan, const Windows<float>& windows, const Block& block,
                     const float* gradient, float* partial, bool start, kernels::Ahead& ahead) {
  const ConvolutionShape& s = plan.shape();
  const auto gemm = cpu_kernels().gemm->gemm;
  kernels::GemmArguments g{};
  // Three pixels of one channel: the rows of all runs at once.
  g.by_threes = plan.depth() == 3;
  const int64_t at_once = g.by_threes ? plan.runs() : 1;
  std::vector<const float*> a(at_once * block.rows);
  g.rows = at_once * plan.depth();
  g.runs = block.rows;
  g.depth = block.columns;
  g.a = a.data();
  g.a_row = 1;
  g.a_step = s.stride_width * s.channels;
  g.b_row = g.c_row = s.out_channels;
  g.ahead = &ahead;
  // Added when a block's chain is done, and not where it starts: short chains err less.
  g.accumulate = !start;
  for (int64_t column = 0; column < s.out_channels; column += kPanel) {
    g.columns = std::min(kPanel, s.out_channels - column);
    g.b = gradient + column;
    for (int64_t run = 0; run < plan.runs(); run += at_once) {
      for (int64_t i = 0; i < at_once; ++i) {
        for (int64_t row = 0; row < block.rows; ++row) {
          a[i * block.rows + row] = windows.pointers()[row * plan.runs() + run + i];
        }
      }
      g.c = partial + run * plan.depth() * s.out_channels + column;
      gemm(g);
    }
  }
}

// The sum of `count` partial gradients [steps][channels], transposed to [channels][steps].
void merge(const float* partials, int64_t count, int64_t steps, int64_t channels, float* sum) {
  constexpr int64_t kRows = 16;
  const auto add_up = cpu_kernels().gemm->add_up;
  const int64_t size = std::max<int64_t>(1, count) * kRows * channels;
  parallel_for(divide_up(steps, kRows), divide_up(kGrain, size), [&](int64_t begin, int64_t end) {
    Scratch rows(kRows * channels);
    for (int64_t i = begin * kRows; i < std::min(steps, end * kRows); i += kRows) {
      const int64_t height = std::min(kRows, steps - i);
      add_up(partials + i * channels, count, steps * channels, height * channels, rows.data());
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t r = 0; r < height; ++r) {
          sum[c * steps + i + r] = rows.data()[r * channels + c];
        }
      }
    }
  });
}

// One part of the input gradient per phase, and whether there are pixels that no tap reaches.
struct InputGradients {
  std::deque<InputGradient> parts;  // which stay where they are
  bool untouched = false;

  InputGradients() = default;
  InputGradients(const ConvolutionShape& s, const float* weight)
      : untouched(s.kernel_height < s.stride_height || s.kernel_width < s.stride_width) {
    const auto horizontal =
        phases(s.width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width);
    for (const Phase& v :
         phases(s.height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height)) {
      for (const Phase& h : horizontal) parts.emplace_back(s, v, h, weight);
    }
  }
};

// What belongs to one task: a block, or an image where blocks need each other. The gradient of a
// chunk is in scratch at once, or where the input's is spread that of a block.
struct Chunks {
  const Plan& plan;
  bool by_image, spread;

  int64_t blocks() const { return by_image ? plan.image_blocks() : 1; }
  int64_t count() const { return plan.blocks() / blocks(); }
  Block first_block(int64_t chunk) const { return plan.block(chunk * blocks()); }
  bool asks_at(int64_t i) const { return spread || i == 0; }
  int64_t pixels(const Block& asked) const {
    return by_image && !spread ? plan.shape().out_height * plan.shape().out_width : asked.pixels();
  }
};

// Floats fetched ahead at most: what is in use must stay in the second cache level.
constexpr int64_t kAheadSize = 1 << 16;

// What the chunk from `pixel` on will read.
kernels::Ahead reads_of(const ConvolutionShape& s, const ConvolutionBackward& pass, int64_t pixel,
                        int64_t pixels) {
  kernels::Ahead ahead;
  pixels = std::min(pixels, s.pixels() - pixel);
  if (pixels <= 0) return ahead;
  pixels = std::min(pixels, kAheadSize / (s.channels + 2 * s.out_channels));
  for (const float* tensor : pass.reads) {
    if (tensor) ahead.add(tensor + pixel * s.out_channels, pixels * s.out_channels);
  }
  if (pass.grad_weight) ahead.add(pass.input + pixel * s.channels, pixels * s.channels);
  return ahead;
}

}  // namespace

void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass) {
  const int64_t wish =
      std::clamp(kChunkSize / std::max(shape.channels, shape.out_channels), kMinPixels, kMaxPixels);
  const Plan plan(shape, {.pixels = wish});
  const ConvolutionShape& s = plan.shape();
  const bool want_input = pass.grad_input != nullptr, want_weight = pass.grad_weight != nullptr;
  const bool spreads = want_input && is_spread(s);
  const Chunks chunks{plan, want_input && !plan.is_matrix_product(), spreads};
  const int64_t count = plan.blocks() > 0 ? chunks.count() : 0;
  const int64_t weights = shape.weights(), image = s.height * s.width * s.channels;
  const int64_t most = std::clamp(kPartialsSize / weights, kMinTasks, kMaxTasks);
  const int64_t tasks = want_weight ? std::min(count, most) : count;
  Scratch partials(want_weight ? tasks * weights : 0);
  const InputGradients input =
      want_input && !spreads ? InputGradients(s, pass.weight) : InputGradients();

  const auto run_chunk = [&](int64_t chunk, Windows<float>& windows, Spread* spread,
                             float* gradient, float* partial, bool start) {
    const Block first = chunks.first_block(chunk);
    const int64_t pixel = plan.first_pixel(first), pixels = chunks.pixels(first);
    float* to = pass.grad_input + (chunks.by_image ? chunk * image : pixel * s.channels);
    kernels::Ahead ahead;
    if (plan.is_matrix_product()) ahead = reads_of(s, pass, pixel + pixels, pixels);
    int64_t asked = 0;  // the pixel the gradients in scratch begin at
    for (int64_t i = 0; i < chunks.blocks(); ++i) {
      const Block block = plan.block(chunk * chunks.blocks() + i);
      if (chunks.asks_at(i)) {
        asked = plan.first_pixel(block);
        pass.grad_output(asked, chunks.pixels(block), gradient);
      }
      const float* rows = gradient + (plan.first_pixel(block) - asked) * s.out_channels;
      if (want_weight) {
        windows.move_to(block);
        weight_gradient(plan, windows, block, rows, partial, start && i == 0, ahead);
      }
      if (spread) spread->add(block, rows, to);
    }
    if (!want_input || spread) return;
    if (input.untouched) std::memset(to, 0, image * sizeof(float));
    for (const InputGradient& part : input.parts) {
      part.compute(gradient, chunks.by_image ? 0 : pixels, to, ahead);
    }
  };
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch gradient(chunks.pixels(plan.block(0)) * s.out_channels);
    Windows windows(plan, pass.input);
    std::optional<Spread> spread;
    if (spreads) spread.emplace(plan, pass.weight);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * count / tasks, last = (task + 1) * count / tasks;
      for (int64_t chunk = first; chunk < last; ++chunk) {
        run_chunk(chunk, windows, spread ? &*spread : nullptr, gradient.data(),
                  partials.data() + task * weights, chunk == first);
      }
    }
  });
  if (want_weight) merge(partials.data(), tasks, plan.steps(), s.out_channels, pass.grad_weight);
}

}  // namespace torchweld::ops::dense
