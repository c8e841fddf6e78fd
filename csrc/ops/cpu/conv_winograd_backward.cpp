// Both gradients from one pass over the output's gradient, a group of images at a time.
#include <optional>

#include "ops/cpu/conv_winograd.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"

namespace torchweld::ops::winograd {
namespace {

// Floats of the output's gradient in a group of images.
constexpr int64_t kGroupSize = 3 << 18;

// Sums the weight's gradient over blocks of tiles. A block's inputs and gradients are transformed
// first, into a buffer that threads share; then each product of one point and two panels of
// channels belongs to one task, which adds up short chains in their order.
class WeightGradient {
 public:
  WeightGradient(const ConvolutionShape& shape, float* grad_weight, bool one_group)
      : shape_(shape), grad_weight_(grad_weight), most_(tiles_per_block(shape)) {
    // One block and many panels: each pair of them is finished while its sums are in cache.
    at_once_ = one_group && Tiles(shape).count() <= most_ && pairs() >= 16;
    if (!at_once_) sums_.emplace(pairs() * kPairSize);
  }

  // A group of images, and the gradient of their output.
  void add(int64_t images, const float* input, const float* grad_output) {
    ConvolutionShape shape = shape_;
    shape.batch = images;
    const Tiles tiles(shape);
    const int64_t size = even_part(tiles.count(), most_);
    const int64_t input_size = inputs_of(size).size();
    const Scratch inputs(input_size + grad_outputs_of(size).size());
    for (int64_t first = 0; first < tiles.count(); first += size) {
      const Block block{first, std::min(size, tiles.count() - first), inputs.data(),
                        inputs.data() + input_size};
      gather(tiles, block, input, grad_output);
      multiply(block);
      empty_ = false;
    }
  }

  void finish() const {
    if (at_once_) return;
    if (empty_) std::fill_n(sums_->data(), pairs() * kPairSize, 0.0f);
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
  // Tiles summed in one chain; the chains are added.
  static constexpr int64_t kChain = 64;

  struct Block {
    int64_t first, count;
    float *inputs, *grad_outputs;  // as Points
  };

  static int64_t tiles_per_block(const ConvolutionShape& s) {
    const int64_t size = kBlockSize / (kWinogradPoints * (s.channels + s.out_channels));
    return std::clamp<int64_t>(size, 1, kBlockTiles);
  }

  Points inputs_of(int64_t tiles) const { return Points(shape_.channels, tiles); }
  Points grad_outputs_of(int64_t tiles) const { return Points(shape_.out_channels, tiles); }
  int64_t pairs() const { return inputs_of(0).panels() * grad_outputs_of(0).panels(); }
  Panel row_panel(int64_t pair) const {
    return Panel(pair / inputs_of(0).panels(), shape_.out_channels);
  }
  Panel column_panel(int64_t pair) const {
    return Panel(pair % inputs_of(0).panels(), shape_.channels);
  }

  void gather(const Tiles& tiles, const Block& block, const float* input,
              const float* grad_output) const {
    const auto& kernels = *cpu_kernels().winograd;
    const int64_t input_image = shape_.height * shape_.width * shape_.channels;
    const int64_t output_image = shape_.out_height * shape_.out_width * shape_.out_channels;
    parallel_for(block.count, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = block.first + i, image = tiles.image(tile);
        inputs_of(block.count)
            .gather(kernels.input, input + image * input_image, tiles.input(tile, shape_.channels),
                    i, block.inputs);
        grad_outputs_of(block.count)
            .gather(kernels.grad_output, grad_output + image * output_image,
                    tiles.output(tile, shape_.out_channels), i, block.grad_outputs);
      }
    });
  }

  void multiply(const Block& block) const {
    if (at_once_) {
      parallel_for(pairs(), 1, [&](int64_t begin, int64_t end) {
        const Scratch sums(kPairSize);
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t p = 0; p < kWinogradPoints; ++p) multiply(block, i, p, sums.data());
          finish(i, sums.data());
        }
      });
      return;
    }
    parallel_for(pairs() * kWinogradPoints, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = i / kWinogradPoints;
        multiply(block, pair, i % kWinogradPoints, sums_->data() + pair * kPairSize);
      }
    });
  }

  // The sum of one point over a block's tiles, added to that of the blocks before.
  void multiply(const Block& block, int64_t pair, int64_t p, float* sums) const {
    const Panel row = row_panel(pair), column = column_panel(pair);
    const Points inputs = inputs_of(block.count), grad_outputs = grad_outputs_of(block.count);
    const float* from = block.inputs + inputs.offset(column.index) + p * inputs.stride(column);
    const float* to =
        block.grad_outputs + grad_outputs.offset(row.index) + p * grad_outputs.stride(row);
    float* sum = sums + p * point_stride(row.columns, column.columns);
    for (int64_t first = 0; first < block.count; first += kChain) {
      const float* a = to + first * row.columns;
      cpu_kernels().gemm->gemm({.rows = row.columns,
                                .columns = column.columns,
                                .a = &a,
                                .runs = 1,
                                .depth = std::min(kChain, block.count - first),
                                .a_row = 1,
                                .a_step = row.columns,
                                .b = from + first * column.columns,
                                .b_row = column.columns,
                                .c = sum,
                                .c_row = column.columns,
                                .accumulate = false,
                                .epilogue = {.residual = empty_ && first == 0 ? nullptr : sum}});
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
  int64_t most_;
  bool at_once_;
  bool empty_ = true;
  std::optional<Scratch> sums_;  // [pairs][36][output channels][input channels]
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
  const int64_t most = even_part(shape.batch, std::max<int64_t>(1, kGroupSize / image));
  const Scratch rows(most * image);
  std::optional<WeightGradient> grad_weight;
  if (pass.grad_weight != nullptr)
    grad_weight.emplace(shape, pass.grad_weight, most >= shape.batch);

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
