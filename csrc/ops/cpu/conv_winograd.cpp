// Forward: blocks of tiles are transformed, multiplied by the weight at each of the 36 points, and
// transformed back to output pixels, all in cache.
#include "ops/cpu/conv_winograd.h"

#include "ops/cpu/scratch.h"
#include "ops/kernels.h"
#include "ops/parallel.h"

namespace torchweld::ops {
namespace winograd {
namespace {

auto input_kernel(const float*) { return cpu_kernels().winograd->input; }
auto input_kernel(const BFloat16*) { return cpu_kernels().winograd->input_bf16; }
auto output_kernel(const float*) { return cpu_kernels().winograd->output; }
auto output_kernel(const BFloat16*) { return cpu_kernels().winograd->output_bf16; }

// One convolution forward. In float32 but for the activations.
template <class T>
class Forward {
 public:
  Forward(const ConvolutionShape& shape, const T* input, const Weight& weight, T* output,
          const kernels::EpilogueOf<T>& epilogue, BlockMoments* moments)
      : shape_(shape),
        tiles_(shape),
        input_(input),
        weight_(weight),
        output_(output),
        epilogue_(epilogue),
        moments_(moments) {}

  // Where the transformed weight stays in cache, threads take blocks of tiles. Where it is large,
  // they share a block of many tiles and take panels: each is transformed once for all of them.
  void run() const {
    const bool panels = weight_.large();
    const int64_t size = panels ? even_part(tiles_.count(), kSharedTiles) : tiles_per_block();
    const int64_t blocks = divide_up(tiles_.count(), std::max<int64_t>(1, size));
    if (moments_ != nullptr) moments_->start(blocks, shape_.out_channels);
    const auto block = [&](int64_t index) {
      return Block{index, index * size, std::min(size, tiles_.count() - index * size)};
    };
    if (panels) {
      for (int64_t i = 0; i < blocks; ++i) run_panels(block(i));
    } else {
      run_blocks(blocks, block);
    }
  }

 private:
  static constexpr int64_t kBlockTiles = 28;
  static constexpr int64_t kSharedTiles = 128;
  struct Block {
    int64_t index, first, count;
  };

  // Whole rows of tiles where they are short: then the pixels of a block are one run. Half as many
  // where threads would get shares of a few blocks, which cannot be equal.
  int64_t tiles_per_block() const {
    const int64_t columns = tiles_.columns();
    const int64_t blocks = divide_up(tiles_.count(), kBlockTiles);
    const int64_t most = 2 < blocks && blocks <= 8 ? kBlockTiles / 2 : kBlockTiles;
    return columns <= most ? most / columns * columns : even_part(columns, most);
  }

  template <class F>
  void run_blocks(int64_t blocks, const F& block) const {
    parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t inputs_size = inputs_of(block(begin)).size();
      const Scratch inputs(inputs_size + products_size(block(begin)));
      float* products = inputs.data() + inputs_size;
      for (int64_t i = begin; i < end; ++i) {
        gather(block(i), 0, block(i).count, inputs.data());
        for (int64_t p = 0; p < weight_.panels(); ++p) {
          kernels::Ahead ahead;
          if (i + 1 < end && p + 1 == weight_.panels()) add_inputs(block(i + 1), ahead);
          if (p == 0) add_outputs(block(i), ahead);
          multiply(block(i), weight_.panel(p), inputs.data(), products, ahead);
        }
      }
    });
  }

  void run_panels(const Block& block) const {
    const Points points = inputs_of(block);
    const Scratch inputs(points.size());
    parallel_for(block.count, 4,
                 [&](int64_t begin, int64_t end) { gather(block, begin, end, inputs.data()); });
    parallel_for(weight_.panels(), 1, [&](int64_t begin, int64_t end) {
      const int64_t stride = point_stride(Weight::kRows, kernels::kPanel);
      const int64_t weight_size = kWinogradPoints * stride;
      const Scratch weight(weight_size + Weight::kWorkspace + products_size(block));
      float* workspace = weight.data() + weight_size;
      float* products = workspace + Weight::kWorkspace;
      for (int64_t p = begin; p < end; ++p) {
        const Panel panel = weight_.panel(p);
        for (int64_t c = 0; c < points.panels(); ++c) {
          const Panel rows = points.panel(c);
          weight_.transform(panel, rows.first, rows.columns, weight.data(), stride, workspace);
          kernels::Ahead ahead = next_weight(p, points, c);
          for (int64_t point = 0; point < kWinogradPoints; ++point) {
            multiply(block, panel, rows, point, weight.data() + point * stride, inputs.data(),
                     products, &ahead);
          }
        }
        finish(block, panel, products);
      }
    });
  }

  // Memory would be idle during the products, which take longer than the transforms.
  kernels::Ahead next_weight(int64_t panel, const Points& points, int64_t rows) const {
    const bool is_last = rows + 1 == points.panels();
    if (is_last && panel + 1 == weight_.panels()) return {};
    const Panel next = points.panel(is_last ? 0 : rows + 1);
    return weight_.ahead(weight_.panel(is_last ? panel + 1 : panel), next.first, next.columns);
  }

  static int64_t products_size(const Block& block) {
    return kWinogradPoints * point_stride(block.count, kernels::kPanel);
  }
  Points inputs_of(const Block& block) const { return Points(shape_.channels, block.count); }

  // The transforms of a block's tiles [begin, end), all input channels.
  void gather(const Block& block, int64_t begin, int64_t end, float* inputs) const {
    const int64_t image = shape_.height * shape_.width * shape_.channels;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tile = block.first + i;
      inputs_of(block).gather(input_kernel(input_), input_ + tiles_.image(tile) * image,
                              tiles_.input(tile, shape_.channels), i, inputs);
    }
  }

  // What gathering the block will read, and what will be written of it.
  void add_inputs(const Block& block, kernels::Ahead& ahead) const {
    tiles_.add_patches(block.first, block.first + block.count, input_, shape_.channels, ahead);
  }
  void add_outputs(const Block& block, kernels::Ahead& ahead) const {
    tiles_.add(block.first, block.first + block.count, output_, shape_.out_channels, ahead);
  }

  // A panel of the output, of a small weight.
  void multiply(const Block& block, const Panel& panel, const float* inputs, float* products,
                kernels::Ahead& ahead) const {
    const Points points = inputs_of(block);
    const float* weight = weight_.points(panel);
    for (int64_t point = 0; point < kWinogradPoints; ++point) {
      for (int64_t c = 0; c < points.panels(); ++c) {
        multiply(block, panel, points.panel(c), point,
                 weight + point * weight_.stride(panel) + c * Weight::kRows * panel.width, inputs,
                 products, point >= kAheadPoint ? &ahead : nullptr);
      }
    }
    finish(block, panel, products);
  }

  // products [36][tiles][panel's columns] of one point from the input channels `rows`, added to
  // those before them: one chain as long as a panel. The transforms magnify the rounding of a
  // chain, and one as long as the channels would double the error of a direct convolution.
  void multiply(const Block& block, const Panel& panel, const Panel& rows, int64_t point,
                const float* weight, const float* inputs, float* products,
                kernels::Ahead* ahead = nullptr) const {
    const Points points = inputs_of(block);
    float* c = products + point * point_stride(block.count, panel.columns);
    const float* a = inputs + points.offset(rows.index) + point * points.stride(rows);
    cpu_kernels().gemm->gemm({.rows = block.count,
                              .columns = panel.columns,
                              .a = &a,
                              .runs = 1,
                              .depth = rows.columns,
                              .a_row = rows.columns,
                              .a_step = 1,
                              .b = weight,
                              .b_row = panel.width,
                              .c = c,
                              .c_row = panel.columns,
                              .accumulate = false,
                              .epilogue = {.residual = rows.first > 0 ? c : nullptr},
                              .ahead = ahead});
  }

  // A panel of the block's output, and its statistics while it is in cache.
  void finish(const Block& block, const Panel& panel, const float* products) const {
    const auto kernel = output_kernel(output_);
    const int64_t channels = shape_.out_channels;
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t tile = block.first + i;
      const int64_t image =
          tiles_.image(tile) * shape_.out_height * shape_.out_width * channels + panel.first;
      kernels::EpilogueOf<T> epilogue = epilogue_;
      if (epilogue.bias != nullptr) epilogue.bias += panel.first;
      if (epilogue.residual != nullptr) epilogue.residual += image;
      kernel(products + i * panel.columns, point_stride(block.count, panel.columns), panel.columns,
             output_ + image, tiles_.output(tile, channels), epilogue);
    }
    if constexpr (std::is_same_v<T, float>) {
      if (moments_ == nullptr) return;
      const int64_t end = block.first + block.count;
      tiles_.for_each_run(block.first, end, [&](int64_t first, int64_t pixels) {
        moments_->add(block.index, output_ + first * channels + panel.first, pixels, channels,
                      panel.first, panel.columns);
      });
    }
  }

  const ConvolutionShape& shape_;
  Tiles tiles_;
  const T* input_;
  const Weight& weight_;
  T* output_;
  const kernels::EpilogueOf<T>& epilogue_;
  BlockMoments* moments_;
};

}  // namespace

template <class T>
void forward(const ConvolutionShape& shape, const T* input, const Weight& weight, T* output,
             const kernels::EpilogueOf<T>& epilogue, BlockMoments* moments) {
  if (weight.large() || weight.packed()) {
    Forward(shape, input, weight, output, epilogue, moments).run();
    return;
  }
  const Scratch packed(weight.packed_size());
  weight.pack(packed.data());
  Forward(shape, input, Weight(shape, nullptr, packed.data()), output, epilogue, moments).run();
}

template void forward(const ConvolutionShape&, const float*, const Weight&, float*,
                      const kernels::Epilogue&, BlockMoments*);

}  // namespace winograd

namespace {

class Winograd : public ConvolutionAlgorithm {
 public:
  const char* name() const override { return "winograd"; }

  bool can_forward(const ConvolutionShape& s) const override {
    return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 &&
           s.stride_width == 1 && s.dilation_height == 1 && s.dilation_width == 1 &&
           s.groups == 1 && s.padding_height <= 2 && s.padding_width <= 2 && s.channels > 0;
  }
  bool can_backward(const ConvolutionShape& shape, bool, bool) const override {
    return can_forward(shape);
  }

  int64_t packed_size(const ConvolutionShape& shape) const override {
    return winograd::Weight(shape, nullptr, nullptr).packed_size();
  }
  using ConvolutionAlgorithm::pack;
  void pack(const ConvolutionShape& shape, const float* weight, float* packed) const override {
    winograd::Weight(shape, weight, nullptr).pack(packed);
  }

  bool packs_itself() const override { return true; }

  void forward(const ConvolutionShape& shape, const ConvolutionForward& pass) const override {
    const winograd::Weight weight(shape, pass.weight, pass.packed);
    winograd::forward(shape, pass.input, weight, pass.output, pass.epilogue, pass.moments);
  }
  void forward(const ConvolutionShape& shape,
               const ConvolutionForwardOf<BFloat16>& pass) const override {
    const winograd::Weight weight(shape, nullptr, pass.packed);
    winograd::forward(shape, pass.input, weight, pass.output, pass.epilogue, nullptr);
  }
  void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass) const override {
    winograd::backward(shape, pass);
  }
};

}  // namespace

const ConvolutionAlgorithm& winograd_convolution() {
  static const Winograd algorithm;
  return algorithm;
}

}  // namespace torchweld::ops
