// Both gradients from one pass over the output's gradient, a group of images at a time.
#include <optional>
#include <vector>

#include "ops/cpu/conv_winograd.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"
#include "ops/parallel.h"

namespace torchweld::ops::winograd {
namespace {

// Floats of the output's gradient in a group of images: as much as a core's second cache holds, or
// three times that where the weight's gradient wants many tiles at once.
constexpr int64_t kGroupSize = 1 << 18;

int64_t images_within(const ConvolutionShape& shape, int64_t size) {
  const int64_t image = shape.out_height * shape.out_width * shape.out_channels;
  return even_part(shape.batch, std::max<int64_t>(1, size / image));
}

// Sums the weight's gradient over blocks of tiles: a block's inputs and gradients are transformed,
// then multiplied at each point, in short chains that are added in their order.
//
// Few channels and many tiles: tasks take runs of small blocks, each in its core's cache, and each
// has sums of its own, which are added in the end. Otherwise threads share large blocks, and each
// product of one point and two panels of channels belongs to one task.
class WeightGradient {
 public:
  WeightGradient(const ConvolutionShape& shape, float* grad_weight)
      : shape_(shape), grad_weight_(grad_weight) {
    const int64_t tiles = Tiles(shape).count();
    const int64_t tasks = std::min(kMaxTasks, tiles / (kTaskBlocks * kSmallBlock));
    if (pairs() == 1 && tasks >= kMinTasks) tasks_ = tasks;
    // One block and many panels: each pair of them is finished while its sums are in cache.
    at_once_ = tiles > 0 && tiles <= tiles_per_block() && images_at_once() >= shape.batch &&
               has_many_pairs();
    if (!at_once_) sums_.emplace(tasks_ * pairs() * kPairSize);
    empty_.assign(tasks_, true);
  }

  // Images of a group: small blocks are shared out over a group, and many pairs want all tiles.
  int64_t images_at_once() const {
    return images_within(shape_, tasks_ > 1 || has_many_pairs() ? 3 * kGroupSize : kGroupSize);
  }

  // A group of images, and the gradient of their output.
  void add(int64_t images, const float* input, const float* grad_output) {
    ConvolutionShape shape = shape_;
    shape.batch = images;
    const Tiles tiles(shape);
    if (tasks_ > 1) {
      add_small(tiles, input, grad_output);
      return;
    }
    const int64_t size = even_part(tiles.count(), tiles_per_block());
    const Scratch points(size_of(size));
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const Block block = block_at(tiles, first, size, points);
      parallel_for(block.count, 4, [&](int64_t begin, int64_t end) {
        gather(tiles, block, begin, end, input, grad_output);
      });
      multiply(block);
      empty_[0] = false;
    }
  }

  void finish() const {
    if (at_once_) return;
    parallel_for(pairs() * kWinogradPoints, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge(i / kWinogradPoints, i % kWinogradPoints);
    });
    parallel_for(pairs(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(i, sums_->data() + i * kPairSize);
    });
  }

 private:
  // Of two panels of channels: a core's cache holds them.
  static constexpr int64_t kPairSize =
      kWinogradPoints * (kernels::kPanel * kernels::kPanel + kPanelGroup);
  // Floats of a block's transformed tiles: a shared cache holds them.
  static constexpr int64_t kBlockSize = 3 << 20;
  static constexpr int64_t kBlockTiles = 512;
  // Tiles of a block that a core's cache holds beside a pair's sums; blocks that make a task's own
  // sums worth adding; and tasks.
  static constexpr int64_t kSmallBlock = 28;
  static constexpr int64_t kTaskBlocks = 7;
  static constexpr int64_t kMinTasks = 4;
  static constexpr int64_t kMaxTasks = 16;
  // Tiles summed in one chain; the chains are added.
  static constexpr int64_t kChain = 64;

  struct Block {
    int64_t first, count;
    float *inputs, *grad_outputs;  // as Points
  };

  int64_t tiles_per_block() const {
    const int64_t size = kBlockSize / (kWinogradPoints * (shape_.channels + shape_.out_channels));
    return std::clamp<int64_t>(size, 1, kBlockTiles);
  }

  Points inputs_of(int64_t tiles) const { return Points(shape_.channels, tiles); }
  Points grad_outputs_of(int64_t tiles) const { return Points(shape_.out_channels, tiles); }
  int64_t size_of(int64_t tiles) const {
    return inputs_of(tiles).size() + grad_outputs_of(tiles).size();
  }
  Block block_at(const Tiles& tiles, int64_t first, int64_t size, const Scratch& points) const {
    return {first, std::min(size, tiles.count() - first), points.data(),
            points.data() + inputs_of(size).size()};
  }
  int64_t pairs() const { return inputs_of(0).panels() * grad_outputs_of(0).panels(); }
  bool has_many_pairs() const { return pairs() >= 16; }
  Panel row_panel(int64_t pair) const {
    return Panel(pair / inputs_of(0).panels(), shape_.out_channels);
  }
  Panel column_panel(int64_t pair) const {
    return Panel(pair % inputs_of(0).panels(), shape_.channels);
  }

  // The transforms of a block's tiles [begin, end).
  void gather(const Tiles& tiles, const Block& block, int64_t begin, int64_t end,
              const float* input, const float* grad_output) const {
    const auto& kernels = *cpu_kernels().winograd;
    const int64_t input_image = shape_.height * shape_.width * shape_.channels;
    const int64_t output_image = shape_.out_height * shape_.out_width * shape_.out_channels;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = block.first + i, image = tiles.image(tile);
      inputs_of(block.count)
          .gather(kernels.input, input + image * input_image, tiles.input(tile, shape_.channels), i,
                  block.inputs);
      grad_outputs_of(block.count)
          .gather(kernels.grad_output, grad_output + image * output_image,
                  tiles.output(tile, shape_.out_channels), i, block.grad_outputs);
    }
  }

  void add_small(const Tiles& tiles, const float* input, const float* grad_output) {
    const int64_t blocks = divide_up(tiles.count(), kSmallBlock);
    parallel_for(tasks_, 1, [&](int64_t begin, int64_t end) {
      const Scratch points(size_of(kSmallBlock));
      for (int64_t task = begin; task < end; ++task) {
        float* sums = sums_->data() + task * kPairSize;
        const int64_t last = (task + 1) * blocks / tasks_;
        for (int64_t i = task * blocks / tasks_; i < last; ++i) {
          const Block block = block_at(tiles, i * kSmallBlock, kSmallBlock, points);
          gather(tiles, block, 0, block.count, input, grad_output);
          kernels::Ahead ahead;
          if (i + 1 < last) {
            const Block next = block_at(tiles, (i + 1) * kSmallBlock, kSmallBlock, points);
            const int64_t until = next.first + next.count;
            tiles.add(next.first, until, grad_output, shape_.out_channels, ahead);
            tiles.add_patches(next.first, until, input, shape_.channels, ahead);
          }
          for (int64_t p = 0; p < kWinogradPoints; ++p) {
            multiply(block, 0, p, sums, empty_[task], p >= kAheadPoint ? &ahead : nullptr);
          }
          empty_[task] = false;
        }
      }
    });
  }

  void multiply(const Block& block) const {
    if (at_once_) {
      parallel_for(pairs(), 1, [&](int64_t begin, int64_t end) {
        const Scratch sums(kPairSize);
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t p = 0; p < kWinogradPoints; ++p) multiply(block, i, p, sums.data(), true);
          finish(i, sums.data());
        }
      });
      return;
    }
    parallel_for(pairs() * kWinogradPoints, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / kWinogradPoints;
        multiply(block, pair, i % kWinogradPoints, sums_->data() + pair * kPairSize, empty_[0]);
      }
    });
  }

  // The sum of one point over a block's tiles, added to that of the blocks before.
  void multiply(const Block& block, int64_t pair, int64_t p, float* sums, bool empty,
                kernels::Ahead* ahead = nullptr) const {
    const Panel row = row_panel(pair), column = column_panel(pair);
    const Points inputs = inputs_of(block.count), grad_outputs = grad_outputs_of(block.count);
    const float* from = block.inputs + inputs.offset(column.index) + p * inputs.stride(column);
    const float* to =
        block.grad_outputs + grad_outputs.offset(row.index) + p * grad_outputs.stride(row);
    float* sum = sums + p * point_stride(row.columns, column.columns);
    const int64_t chain = even_part(block.count, kChain);
    for (int64_t first = 0; first < block.count; first += chain) {
      const float* a = to + first * row.columns;
      cpu_kernels().gemm->gemm({.rows = row.columns,
                                .columns = column.columns,
                                .a = &a,
                                .runs = 1,
                                .depth = std::min(chain, block.count - first),
                                .a_row = 1,
                                .a_step = row.columns,
                                .b = from + first * column.columns,
                                .b_row = column.columns,
                                .c = sum,
                                .c_row = column.columns,
                                .accumulate = false,
                                .epilogue = {.residual = empty && first == 0 ? nullptr : sum},
                                .ahead = ahead});
    }
  }

  // The sum of one point over all tasks, in their order.
  void merge(int64_t pair, int64_t p) const {
    const int64_t rows = row_panel(pair).columns, columns = column_panel(pair).columns;
    const int64_t size = rows * columns;
    float* sums = sums_->data() + pair * kPairSize + p * point_stride(rows, columns);
    if (empty_[0]) std::fill_n(sums, size, 0.0f);
    for (int64_t task = 1; task < tasks_; ++task) {
      if (empty_[task]) continue;
      const float* more = sums + task * pairs() * kPairSize;
      for (int64_t i = 0; i < size; ++i) sums[i] += more[i];
    }
  }

  void finish(int64_t pair, const float* sums) const {
    const Panel row = row_panel(pair), column = column_panel(pair);
    const int64_t channels = shape_.channels;
    cpu_kernels().winograd->grad_weight(sums, point_stride(row.columns, column.columns),
                                        row.columns, column.columns,
                                        grad_weight_ + row.first * 9 * channels + column.first,
                                        {3 * channels, channels, 9 * channels});
  }

  const ConvolutionShape& shape_;
  float* grad_weight_;
  int64_t tasks_ = 1;
  bool at_once_;
  std::optional<Scratch> sums_;  // [tasks][pairs][36][output channels][input channels]
  std::vector<char> empty_;      // whether nothing has been added to a task's sums
};

// The convolution that takes the output's gradient to the input's.
ConvolutionShape turned(const ConvolutionShape& shape) {
  ConvolutionShape result = shape;
  std::swap(result.height, result.out_height);
  std::swap(result.width, result.out_width);
  std::swap(result.channels, result.out_channels);
  result.padding_height = 2 - shape.padding_height;
  result.padding_width = 2 - shape.padding_width;
  return result;
}

void gradient_rows(const GradientRows& grad_output, int64_t first, int64_t count, int64_t channels,
                   float* rows) {
  const int64_t step = std::max<int64_t>(1, (1 << 14) / channels);
  parallel_for(divide_up(count, step), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixel = i * step;
      grad_output(first + pixel, std::min(step, count - pixel), rows + pixel * channels);
    }
  });
}

}  // namespace

void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass) {
  ConvolutionShape to_input = turned(shape);
  Weight weight(to_input, pass.weight, nullptr, true);
  std::optional<Scratch> packed;
  if (pass.grad_input != nullptr && !weight.large()) {
    packed.emplace(weight.packed_size());
    weight.pack(packed->data());
    weight = Weight(to_input, nullptr, packed->data());
  }
  const int64_t pixels = shape.out_height * shape.out_width, image = pixels * shape.out_channels;
  const int64_t input_image = shape.height * shape.width * shape.channels;
  std::optional<WeightGradient> grad_weight;
  if (pass.grad_weight != nullptr) grad_weight.emplace(shape, pass.grad_weight);
  const int64_t most =
      grad_weight ? grad_weight->images_at_once() : images_within(shape, kGroupSize);
  const Scratch rows(most * image);

  for (int64_t first = 0; first < shape.batch; first += most) {
    const int64_t images = std::min(most, shape.batch - first);
    gradient_rows(pass.grad_output, first * pixels, images * pixels, shape.out_channels,
                  rows.data());
    to_input.batch = images;
    if (pass.grad_input != nullptr) {
      forward(to_input, rows.data(), weight, pass.grad_input + first * input_image, {}, nullptr);
    }
    if (grad_weight) grad_weight->add(images, pass.input + first * input_image, rows.data());
  }
  if (grad_weight) grad_weight->finish();
}

}  // namespace torchweld::ops::winograd
