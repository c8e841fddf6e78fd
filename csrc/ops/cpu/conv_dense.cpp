// Forward by matrix products over packed weights. A kernel row's pixels and channels are contiguous
// in channels_last memory, so no image is ever unrolled into columns.
#include "ops/cpu/conv_dense.h"

#include <algorithm>
#include <cstring>

#include "ops/kernels.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace dense {
namespace {

using kernels::kPanel;

// Output floats of a block: few enough to be in cache when its statistics are taken.
constexpr int64_t kBlockSize = 1 << 14;
// Pixels of a block at least: each block reads all weights.
constexpr int64_t kBlockPixels = 48;
// Pixels of a block at least, to share out a small batch.
constexpr int64_t kLeastPixels = 28;
// Pixels from which on the products with a panel have as many steps as the next one has lines.
constexpr int64_t kFetchPixels = 28;
// Floats of a panel that stay in cache while a block's pixels pass by.
constexpr int64_t kSliceSize = 1 << 17;
// Tasks at least, where panels can be shared out: for batches of one. With fewer than half as many
// panels blocks become smaller.
constexpr int64_t kTasks = 16;
// Multiply-adds that are worth a thread.
constexpr int64_t kGrain = 1 << 20;
// Multiply-adds in the time a value takes from memory.
constexpr int64_t kWaited = 16;

// The size of even parts of `size`, near `wish`.
int64_t part_near(int64_t size, int64_t wish) {
  wish = std::max<int64_t>(1, wish);
  return std::max<int64_t>(1, divide_up(size, std::max<int64_t>(1, (size + wish / 2) / wish)));
}

// Every output pixel reads the input pixel at its own place.
bool reads_each_by_itself(const ConvolutionShape& s) {
  return s.kernel_height == 1 && s.kernel_width == 1 && s.stride_height == 1 &&
         s.stride_width == 1 && s.padding_height == 0 && s.padding_width == 0 &&
         s.out_height == s.height && s.out_width == s.width;
}

}  // namespace

Plan::Plan(const ConvolutionShape& shape, const Cut& cut)
    : shape_(shape), matrix_product_(cut.regroup && reads_each_by_itself(shape)) {
  if (matrix_product_) {
    shape_.width = shape_.out_width = shape.pixels();
    shape_.batch = shape_.height = shape_.out_height = 1;
  }
  columns_ = part_near(shape_.out_width, cut.pixels);
  // The product's tiles are 7 rows high, or 14 where they are narrow.
  const int64_t tile = shape_.out_channels > kPanel / 2 ? 7 : 14;
  if (matrix_product_) columns_ = divide_up(columns_, tile) * tile;
  rows_ = columns_ < shape_.out_width ? 1 : part_near(shape_.out_height, cut.pixels / columns_);
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

template <class T>
Windows<T>::Windows(const Plan& plan, const T* input) : plan_(plan), input_(input) {
  const ConvolutionShape& s = plan.shape();
  const int64_t reach = (s.out_width - 1) * s.stride_width +
                        (s.kernel_width - 1) * s.dilation_width - s.padding_width;
  const int64_t right = std::max<int64_t>(0, reach + 1 - s.width);
  left_ = std::max<int64_t>(0, s.padding_width);
  if (left_ + right > 0) slots_ = plan.input_rows(plan.block_rows());
  padded_ = (left_ + s.width + right) * s.channels;
  if (!plan.is_matrix_product()) rows_.resize((slots_ + 1) * padded_);
  kept_.assign(slots_, -1);
  pointers_.resize(plan.block_rows() * plan.runs());
}

template <class T>
void Windows<T>::move_to(const Block& block) {
  const ConvolutionShape& s = plan_.shape();
  const int64_t top = block.row * s.stride_height - s.padding_height;
  const int64_t size = s.width * s.channels;
  if (slots_ > 0) {
    const int64_t end = std::min(s.height, top + plan_.input_rows(block.rows));
    for (int64_t h = std::max<int64_t>(0, top); h < end; ++h) {
      const int64_t source = block.image * s.height + h;
      if (kept_[h % slots_] == source) continue;
      kept_[h % slots_] = source;
      std::memcpy(rows_.data() + h % slots_ * padded_ + left_ * s.channels, input_ + source * size,
                  size * sizeof(T));
    }
  }

  const int64_t column = block.column * s.stride_width - s.padding_width + left_;
  const T** to = pointers_.data();
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t r = 0; r < s.kernel_height; ++r) {
      const T* from = input_row(block.image, top + row * s.stride_height + r * s.dilation_height) +
                      column * s.channels;
      for (int64_t k = 0; k < plan_.row_runs(); ++k) {
        *to++ = from + k * s.dilation_width * s.channels;
      }
    }
  }
}

template <class T>
const T* Windows<T>::input_row(int64_t image, int64_t row) const {
  const ConvolutionShape& s = plan_.shape();
  if (row < 0 || row >= s.height) return rows_.data() + slots_ * padded_;
  if (slots_ > 0) return rows_.data() + row % slots_ * padded_;
  return input_ + (image * s.height + row) * s.width * s.channels;
}

template class Windows<float>;
template class Windows<BFloat16>;

// Asks for a panel all at once, where no products before it are long enough to fetch it line by
// line: a thread's first, and all of them where pixels are few. Where a batch is small the weight
// comes from memory.
void fetch_panel(const Plan& plan, const float* packed, int64_t panel) {
  const int64_t width = panel_width(plan.shape().out_channels, panel);
  const float* data = packed + panel * kPanel * plan.packed_steps();
  for (int64_t i = 0; i < std::min(kSliceSize, width * plan.packed_steps()); i += 16) {
    __builtin_prefetch(data + i, 0, 2);
  }
}

void forward_block(const Plan& plan, const Windows<float>& windows, const Block& block,
                   const float* packed, const Target<float>& target,
                   const kernels::Epilogue& epilogue, int64_t first, int64_t last,
                   kernels::Ahead* ahead) {
  const ConvolutionShape& s = plan.shape();
  const int64_t runs = plan.runs(), depth = plan.depth();
  const auto gemm = cpu_kernels().gemm->gemm;
  std::vector<const float*> a(runs);

  // A panel too large for the cache is used slice by slice: some runs, or a part of one.
  const int64_t slice_runs = std::clamp<int64_t>(kSliceSize / (depth * kPanel), 1, runs);
  const int64_t slice_depth = slice_runs > 1 ? depth : part_near(depth, kSliceSize / kPanel);
  const auto compute_slice = [&](int64_t panel, int64_t run, int64_t k) {
    const int64_t column = panel * kPanel, width = panel_width(s.out_channels, panel);
    const bool is_last = run + slice_runs >= runs && k + slice_depth >= depth;
    kernels::GemmArguments g{};
    g.rows = block.columns;
    g.columns = std::min(kPanel, s.out_channels - column);
    g.runs = std::min(slice_runs, runs - run);
    g.depth = std::min(slice_depth, depth - k);
    g.a = a.data();
    g.a_row = s.stride_width * s.channels;
    g.a_step = 1;
    g.b = packed + column * plan.steps() + (run * depth + k) * width;
    g.b_row = width;
    g.c_row = target.pixel;
    g.accumulate = run > 0 || k > 0;
    kernels::Ahead next;
    g.ahead = ahead;
    if (ahead == nullptr && is_last && panel + 1 < panels_of(s.out_channels)) {
      next.add(packed + (column + kPanel) * plan.steps(),
               panel_width(s.out_channels, panel + 1) * plan.steps());
      g.ahead = &next;
    }
    for (int64_t row = 0; row < block.rows; ++row) {
      for (int64_t i = 0; i < g.runs; ++i) a[i] = windows.pointers()[row * runs + run + i] + k;
      g.c = target.at(block) + row * target.row + column;
      if (is_last) {
        g.epilogue = epilogue;
        if (epilogue.bias != nullptr) g.epilogue.bias += column;
        if (epilogue.residual != nullptr) g.epilogue.residual += g.c - target.data;
      }
      gemm(g);
    }
  };
  for (int64_t panel = first; panel < last; ++panel) {
    if (block.pixels() < kFetchPixels && panel + 1 < last) fetch_panel(plan, packed, panel + 1);
    for (int64_t run = 0; run < runs; run += slice_runs) {
      for (int64_t k = 0; k < depth; k += slice_depth) compute_slice(panel, run, k);
    }
  }
}

}  // namespace dense

namespace {

using namespace dense;

template <class T>
void forward_pass(const ConvolutionShape& shape, const ConvolutionForwardOf<T>& pass) {
  const int64_t channels = shape.out_channels;
  const int64_t panels = panels_of(channels);
  const int64_t share = shape.pixels() * panels / (kTasks / 2);
  const Plan plan(shape, {.pixels = std::min(std::max(kBlockPixels, kBlockSize / channels),
                                             std::max(kLeastPixels, share))});
  const int64_t blocks = plan.blocks();
  if (pass.moments != nullptr) pass.moments->start(blocks, channels);
  if (blocks == 0) return;
  const int64_t row = plan.shape().out_width * channels;
  const Target<T> target{pass.output, plan.shape().out_height * row, row, channels};
  const int64_t group = part_near(panels, panels * blocks / kTasks);
  const int64_t groups = divide_up(panels, group), tasks = blocks * groups;
  // A weight of few pixels is waited for, not multiplied with.
  const int64_t size = std::max(shape.pixels(), kWaited) * shape.weights() / tasks;
  // Threads read each a part of what is larger, the weight or the input, and all of the other;
  // where rows are copied, of the input alone.
  const bool by_panels =
      plan.is_matrix_product() && groups > 1 && shape.weights() > shape.pixels() * shape.channels;
  parallel_for(tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
               [&](int64_t begin, int64_t end) {
                 Windows<T> windows(plan, pass.input);
                 const int64_t panel = (by_panels ? begin / blocks : begin % groups) * group;
                 fetch_panel(plan, pass.packed, panel);
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t index = by_panels ? task % blocks : task / groups;
                   const Block block = plan.block(index);
                   const int64_t first = (by_panels ? task / blocks : task % groups) * group;
                   const int64_t last = std::min(panels, first + group);
                   windows.move_to(block);
                   forward_block(plan, windows, block, pass.packed, target, pass.epilogue, first,
                                 last);
                   if constexpr (std::is_same_v<T, float>) {
                     if (pass.moments == nullptr) continue;
                     const int64_t c = first * kPanel;
                     pass.moments->add(index, target.at(block) + c, block.pixels(), channels, c,
                                       std::min(channels, last * kPanel) - c);
                   }
                 }
               });
}

// Where a kernel reaches farther than the image, the window of padded rows would be mostly zeros.
bool is_dilated_beyond_image(const ConvolutionShape& s) {
  return (s.dilation_height > 1 && s.dilation_height * (s.kernel_height - 1) >= s.height) ||
         (s.dilation_width > 1 && s.dilation_width * (s.kernel_width - 1) >= s.width);
}

class DenseConvolution final : public ConvolutionAlgorithm {
 public:
  const char* name() const override { return "dense"; }

  bool can_forward(const ConvolutionShape& s) const override {
    return s.groups == 1 && !is_dilated_beyond_image(s) &&
           (s.dtype == kernels::DType::float32 || cpu_kernels().gemm_bf16 != nullptr);
  }

  bool can_backward(const ConvolutionShape& s, bool input, bool) const override {
    const bool strided = s.stride_height > 1 || s.stride_width > 1;
    const bool dilated = s.dilation_height > 1 || s.dilation_width > 1;
    return s.groups == 1 && !(input && strided && dilated) && !is_dilated_beyond_image(s);
  }

  // Other layouts are whole groups of columns: the odd float says that this one holds bfloat16.
  int64_t packed_size(const ConvolutionShape& s) const override {
    const int64_t odd = s.dtype == kernels::DType::bfloat16 ? 1 : 0;
    return dense::packed_size(s.out_channels, Plan(s, {.pixels = 1}).packed_steps()) + odd;
  }

  void pack(const ConvolutionShape& s, const float* weight, float* packed) const override {
    const int64_t steps = s.weights() / s.out_channels;
    const auto kernel = cpu_kernels().gemm->pack;
    parallel_for(panels_of(s.out_channels), 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * kPanel * steps;
        kernel(weight + first, steps, std::min(kPanel, s.out_channels - panel * kPanel), steps,
               packed + first, panel_width(s.out_channels, panel));
      }
    });
  }
  void pack(const ConvolutionShape& s, const BFloat16* weight, float* packed) const override {
    dense::pack(Plan(s, {.pixels = 1}), weight, packed);
    packed[packed_size(s) - 1] = 0;
  }

  void forward(const ConvolutionShape& shape, const ConvolutionForward& pass) const override {
    forward_pass(shape, pass);
  }
  void forward(const ConvolutionShape& shape,
               const ConvolutionForwardOf<BFloat16>& pass) const override {
    forward_pass(shape, pass);
  }

  void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass) const override {
    dense::backward(shape, pass);
  }
};

}  // namespace

const ConvolutionAlgorithm& dense_convolution() {
  static const DenseConvolution algorithm;
  return algorithm;
}

}  // namespace torchweld::ops
