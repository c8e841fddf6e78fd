// Forward by matrix products over packed weights. A kernel row's pixels and channels are contiguous
// in channels_last memory, so no image is ever unrolled into columns.
#include "ops/cpu/conv_dense.h"

#include <algorithm>
#include <cstring>

#include "ops/kernels.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace dense {
namespace {

using kernels::kPanel;

// Output floats of a block: few enough to be in cache when its statistics are taken.
constexpr int64_t kBlockSize = 1 << 14;
// Pixels of a block at least: each block reads all weights.
constexpr int64_t kBlockPixels = 48;
// Floats of a panel that stay in cache while a block's pixels pass by.
constexpr int64_t kSliceSize = 1 << 17;
// Tasks at least, where panels can be shared out: for batches of one.
constexpr int64_t kTasks = 16;
// Multiply-adds that are worth a thread.
constexpr int64_t kGrain = 1 << 20;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Size of the parts when `size` is cut as evenly as can be into parts of about `wish`.
int64_t even_part(int64_t size, int64_t wish) {
  const int64_t parts = std::max<int64_t>(1, size / std::max<int64_t>(1, wish));
  return std::max<int64_t>(1, divide_up(size, parts));
}

bool is_matrix_product(const ConvolutionShape& s) {
  return s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 &&
         s.stride_width == 1 && s.padding_height == 0 && s.padding_width == 0;
}

}  // namespace

int64_t panel_width(int64_t columns, int64_t panel) {
  const int64_t left = std::min(kPanel, columns - panel * kPanel);
  return divide_up(left, kernels::kPanelGroup) * kernels::kPanelGroup;
}

Plan::Plan(const ConvolutionShape& shape) : shape_(shape) {
  if (is_matrix_product(shape)) {
    shape_.width = shape_.out_width = shape.pixels();
    shape_.batch = shape_.height = shape_.out_height = 1;
  }
  const int64_t pixels = std::max(kBlockPixels, kBlockSize / shape_.out_channels);
  columns_ = even_part(shape_.out_width, pixels);
  rows_ = columns_ < shape_.out_width ? 1 : even_part(shape_.out_height, pixels / columns_);
  row_blocks_ = divide_up(shape_.out_height, rows_);
  column_blocks_ = divide_up(shape_.out_width, columns_);
}

Block Plan::block(int64_t index) const {
  Block block;
  block.column = index % column_blocks_ * columns_;
  index /= column_blocks_;
  block.row = index % row_blocks_ * rows_;
  block.image = index / row_blocks_;
  block.rows = std::min(rows_, shape_.out_height - block.row);
  block.columns = std::min(columns_, shape_.out_width - block.column);
  return block;
}

Windows::Windows(const Plan& plan, const float* input) : plan_(plan), input_(input) {
  const ConvolutionShape& s = plan.shape();
  padded_ = (s.width + 2 * s.padding_width) * s.channels;
  slots_ = s.padding_width > 0 ? plan.input_rows(plan.block_rows()) : 0;
  const bool zeros = s.padding_height > 0 || s.padding_width > 0;
  rows_.resize((slots_ + zeros) * padded_);
  kept_.assign(slots_, -1);
}

void Windows::move_to(const Block& block) {
  const ConvolutionShape& s = plan_.shape();
  image_ = block.image;
  if (slots_ == 0) return;
  const int64_t row = block.row * s.stride_height - s.padding_height;
  const int64_t end = std::min(s.height, row + plan_.input_rows(block.rows));
  for (int64_t h = std::max<int64_t>(0, row); h < end; ++h) {
    const int64_t slot = h % slots_, source = image_ * s.height + h, size = s.width * s.channels;
    if (kept_[slot] == source) continue;
    kept_[slot] = source;
    std::memcpy(rows_.data() + slot * padded_ + s.padding_width * s.channels,
                input_ + source * size, size * sizeof(float));
  }
}

const float* Windows::input_row(int64_t row) const {
  const ConvolutionShape& s = plan_.shape();
  if (row < 0 || row >= s.height) return rows_.data() + slots_ * padded_;
  if (slots_ > 0) return rows_.data() + row % slots_ * padded_;
  return input_ + (image_ * s.height + row) * s.width * s.channels;
}

void Windows::pointers(int64_t row, int64_t column, const float** runs) const {
  const ConvolutionShape& s = plan_.shape();
  for (int64_t r = 0; r < s.kernel_height; ++r) {
    const float* from =
        input_row(row * s.stride_height - s.padding_height + r * s.dilation_height) +
        column * s.stride_width * s.channels;
    for (int64_t k = 0; k < plan_.row_runs(); ++k) {
      *runs++ = from + k * s.dilation_width * s.channels;
    }
  }
}

void forward_block(const Plan& plan, const Windows& windows, const Block& block,
                   const ConvolutionForward& pass, int64_t first_panel, int64_t last_panel) {
  const ConvolutionShape& s = plan.shape();
  const int64_t steps = plan.steps(), runs = plan.runs(), depth = plan.depth();
  const int64_t offset = plan.first_pixel(block) * s.out_channels;
  const auto gemm = cpu_kernels().gemm->gemm;
  std::vector<const float*> a(block.rows * runs), slice_a(runs);
  for (int64_t row = 0; row < block.rows; ++row) {
    windows.pointers(block.row + row, block.column, a.data() + row * runs);
  }

  // A panel too large for the cache is used slice by slice: some runs, or a part of one.
  const int64_t slice_runs = std::clamp<int64_t>(kSliceSize / (depth * kPanel), 1, runs);
  const int64_t slice_depth = slice_runs > 1 ? depth : even_part(depth, kSliceSize / kPanel);
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t first = panel * kPanel, width = panel_width(s.out_channels, panel);
    const float* packed = pass.packed + panel * kPanel * steps;
    for (int64_t run = 0; run < runs; run += slice_runs) {
      for (int64_t k = 0; k < depth; k += slice_depth) {
        const bool is_first = run == 0 && k == 0;
        const bool is_last = run + slice_runs >= runs && k + slice_depth >= depth;
        kernels::GemmArguments g{};
        g.rows = block.columns;
        g.columns = std::min(kPanel, s.out_channels - first);
        g.runs = std::min(slice_runs, runs - run);
        g.depth = std::min(slice_depth, depth - k);
        g.a = slice_a.data();
        g.a_row = s.stride_width * s.channels;
        g.a_step = 1;
        g.b = packed + (run * depth + k) * width;
        g.b_row = width;
        g.c_row = s.out_channels;
        g.accumulate = !is_first;
        for (int64_t row = 0; row < block.rows; ++row) {
          for (int64_t i = 0; i < g.runs; ++i) slice_a[i] = a[row * runs + run + i] + k;
          const int64_t at = offset + row * block.columns * s.out_channels + first;
          g.c = pass.output + at;
          if (is_last) {
            const kernels::Epilogue& e = pass.epilogue;
            g.epilogue = e;
            if (e.bias != nullptr) g.epilogue.bias = e.bias + first;
            if (e.residual != nullptr) g.epilogue.residual = e.residual + at;
          }
          gemm(g);
        }
      }
    }
  }
}

}  // namespace dense

namespace {

using namespace dense;

class DenseConvolution final : public ConvolutionAlgorithm {
 public:
  const char* name() const override { return "dense"; }

  bool can_forward(const ConvolutionShape& shape) const override { return shape.groups == 1; }

  bool can_backward(const ConvolutionShape&, bool, bool) const override { return false; }

  int64_t packed_size(const ConvolutionShape& s) const override {
    const int64_t last = (s.out_channels - 1) / kPanel;
    return (last * kPanel + panel_width(s.out_channels, last)) * (s.weights() / s.out_channels);
  }

  void pack(const ConvolutionShape& s, const float* weight, float* packed) const override {
    const int64_t steps = s.weights() / s.out_channels;
    const auto kernel = cpu_kernels().gemm->pack;
    parallel_for(divide_up(s.out_channels, kPanel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel * steps;
        kernel(weight + first, steps, std::min(kPanel, s.out_channels - panel * kPanel), steps,
               packed + first, panel_width(s.out_channels, panel));
      }
    });
  }

  void forward(const ConvolutionShape& shape, const ConvolutionForward& pass) const override {
    const Plan plan(shape);
    const int64_t blocks = plan.blocks(), channels = shape.out_channels;
    if (pass.moments != nullptr) pass.moments->start(blocks, channels);
    if (blocks == 0) return;
    const int64_t panels = divide_up(channels, kPanel);
    const int64_t group = even_part(panels, panels * blocks / kTasks);
    const int64_t groups = divide_up(panels, group), tasks = blocks * groups;
    const int64_t task_size = shape.pixels() * shape.weights() / tasks;
    parallel_for(tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, task_size)),
                 [&](int64_t begin, int64_t end) {
                   Windows windows(plan, pass.input);
                   for (int64_t task = begin; task < end; ++task) {
                     const Block block = plan.block(task / groups);
                     const int64_t first = task % groups * group;
                     const int64_t last = std::min(panels, first + group);
                     windows.move_to(block);
                     forward_block(plan, windows, block, pass, first, last);
                     if (pass.moments == nullptr) continue;
                     const int64_t c = first * kPanel;
                     pass.moments->add(
                         task / groups, pass.output + plan.first_pixel(block) * channels + c,
                         block.pixels(), channels, c, std::min(channels, last * kPanel) - c);
                   }
                 });
  }

  void backward(const ConvolutionShape&, const ConvolutionBackward&) const override {}
};

}  // namespace

const ConvolutionAlgorithm& dense_convolution() {
  static const DenseConvolution algorithm;
  return algorithm;
}

}  // namespace torchweld::ops
