// Both gradients of a block of output rows while the gradients of its output are in cache.
#include <numeric>

#include "ops/cpu/conv_depthwise.h"
#include "ops/cpu/past_cache.h"
#include "ops/cpu/scratch.h"
#include "ops/kernels.h"
#include "ops/memory.h"
#include "ops/parallel.h"

namespace torchweld::ops::depthwise {
namespace {

using kernels::DepthwiseForward;
using kernels::DepthwiseWeightGradient;

// Of the input pixels along one axis, every stride-th meets the same taps. Pixel start + i * stride
// of this phase meets, in the order of the output pixels, tap `last - t * step` on output pixel
// first + i + t * tap_step, for t < taps.
struct Phase {
  int64_t start;
  int64_t taps = 0;
  int64_t last = 0, step = 1;
  int64_t first = 0, tap_step = 1;
};

std::vector<Phase> phases(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation);
  std::vector<Phase> result;
  for (int64_t start = 0; start < stride; ++start) {
    Phase phase{.start = start, .step = stride / common, .tap_step = dilation / common};
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t distance = start + padding - tap * dilation;
      if (distance % stride != 0) continue;
      ++phase.taps;
      phase.last = tap;
      phase.first = distance / stride;
    }
    result.push_back(phase);
  }
  return result;
}

class Backward {
 public:
  Backward(const Shape& shape, const ConvolutionBackward& pass)
      : s_(shape),
        pass_(pass),
        rows_(rows_per_block(s_, 2 * s_.stride_height * input_row(s_))),
        blocks_((s_.out_height + rows_ - 1) / rows_),
        vertical_(
            phases(s_.kernel_height, s_.stride_height, s_.padding_height, s_.dilation_height)),
        horizontal_(phases(s_.kernel_width, s_.stride_width, s_.padding_width, s_.dilation_width)),
        streamed_(leaves_cache(s_.batch * s_.height * input_row(s_) * 4)) {
    for (const Phase& v : vertical_) {
      for (const Phase& h : horizontal_) weights_.push_back(packed(v, h));
    }
  }

  void run() {
    if (s_.batch < kFewImages) {
      image_by_image();
    } else {
      images_at_once();
    }
  }

 private:
  // As many images keep all threads of a large machine busy; fewer are cut into bands.
  static constexpr int64_t kFewImages = 8;
  // Sums of so many parts of a batch are kept apart.
  static constexpr int64_t kMaxParts = 64;

  // Gradient rows of one image, or of as many of its rows as `size`, in a ring.
  struct Window {
    float* data;
    int64_t size;
  };

  // Where the sums for the weight of one part go.
  struct Sums {
    explicit Sums(const Shape& s) : sums(packed_size(s)), totals(packed_size(s)) {}
    std::vector<float> sums;
    std::vector<double> totals;
    int64_t pixels = 0;  // in the sums

    void flush() {
      cpu_kernels().depthwise->flush(sums.data(), totals.data(), sums.size());
      pixels = 0;
    }
  };

  // --- schedules ---
  // Images in parallel. Each asks for its gradients a block of rows at a time, into a window that
  // stays in cache.
  void images_at_once() {
    const int64_t size = (s_.batch + kMaxParts - 1) / kMaxParts;
    const int64_t parts = (s_.batch + size - 1) / size;
    const int64_t halo =
        ((s_.kernel_height - 1) * s_.dilation_height + s_.stride_height - 1) / s_.stride_height;
    const int64_t window_rows = std::min(s_.out_height, rows_ + halo);
    std::vector<Sums> sums(parts, Sums(s_));
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      const Scratch data(window_rows * output_row(s_));
      const Window window{data.data(), window_rows};
      for (int64_t part = begin; part < end; ++part) {
        for (int64_t n = part * size; n < std::min(s_.batch, (part + 1) * size); ++n) {
          for (int64_t block = 0; block < blocks_; ++block) {
            ask(window, n, block);
            use(window, n, block, sums[part]);
          }
        }
        sums[part].flush();
      }
    });
    merge(sums);
  }

  // Blocks of rows in parallel: first the gradients of a whole image, then what uses them.
  void image_by_image() {
    const Tensor scratch = empty({1, s_.out_height, s_.out_width, s_.channels}, ScalarType::Float,
                                 torch::headeronly::MemoryFormat::Contiguous);
    const Window window{scratch.mutable_data_ptr<float>(), s_.out_height};
    std::vector<Sums> sums(blocks_, Sums(s_));
    for (int64_t n = 0; n < s_.batch; ++n) {
      parallel_for(blocks_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) ask(window, n, block);
      });
      parallel_for(blocks_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) use(window, n, block, sums[block]);
      });
    }
    for (Sums& part : sums) part.flush();
    merge(sums);
  }

  int64_t first_row(int64_t block) const { return std::min(s_.out_height, block * rows_); }

  void ask(const Window& window, int64_t image, int64_t block) const {
    for (int64_t p = first_row(block); p < first_row(block + 1);) {
      // Up to the end of the ring at once.
      const int64_t place = p % window.size;
      const int64_t count = std::min(first_row(block + 1) - p, window.size - place);
      pass_.grad_output((image * s_.out_height + p) * s_.out_width, count * s_.out_width,
                        window.data + place * output_row(s_));
      p += count;
    }
  }

  void use(const Window& window, int64_t image, int64_t block, Sums& sums) const {
    if (pass_.grad_weight) weight_gradient(window, image, block, sums);
    if (pass_.grad_input) input_gradient(window, image, block);
  }

  // --- weight ---
  void weight_gradient(const Window& window, int64_t image, int64_t block, Sums& sums) const {
    const int64_t first = first_row(block), count = first_row(block + 1) - first;
    const InputRows rows(s_, pass_.input, image, first, count);
    std::vector<const float*> grad(count);
    for (int64_t i = 0; i < count; ++i) grad[i] = row(window, first + i);
    DepthwiseWeightGradient d{};
    d.taps = rows.taps(s_);
    d.grad = grad.data();
    d.height = count;
    d.width = s_.out_width;
    d.sums = sums.sums.data();
    d.input_ahead = input_of(s_, pass_.input, image, first + count, count);
    cpu_kernels().depthwise->weight_gradient(d);
    // Sums of more values would lose what summing pairwise, as others do, keeps.
    sums.pixels += count * s_.out_width;
    if (sums.pixels >= 512) sums.flush();
  }

  void merge(const std::vector<Sums>& sums) const {
    if (!pass_.grad_weight) return;
    for (int64_t c = 0; c < s_.channels; ++c) {
      for (int64_t t = 0; t < taps(s_); ++t) {
        const int64_t at =
            (c / kDepthwiseGroup * taps(s_) + t) * kDepthwiseGroup + c % kDepthwiseGroup;
        double total = 0;
        for (const Sums& part : sums) total += part.totals[at];
        pass_.grad_weight[c * taps(s_) + t] = static_cast<float>(total);
      }
    }
  }

  // --- input ---
  // Input rows before this one meet no output row from `first_row(block)` on.
  int64_t first_input_row(int64_t block) const {
    if (block == 0) return 0;
    if (block == blocks_) return s_.height;
    return std::clamp<int64_t>(first_row(block) * s_.stride_height - s_.padding_height, 0,
                               s_.height);
  }

  // Every input row whose gradients are complete with this block.
  void input_gradient(const Window& window, int64_t image, int64_t block) const {
    const int64_t begin = first_input_row(block), end = first_input_row(block + 1);
    const int64_t stride = s_.stride_height;
    // The rows of the next block are fetched meanwhile, by each pair of phases its share.
    const int64_t next = image * s_.height + end;
    const int64_t rows = std::min(end - begin, s_.batch * s_.height - next);
    const int64_t share = rows * input_row(s_) / static_cast<int64_t>(weights_.size());
    DepthwiseAhead ahead{pass_.grad_input + next * input_row(s_), share * 4};
    for (size_t v = 0; v < vertical_.size(); ++v) {
      const int64_t start = vertical_[v].start;
      const int64_t first = begin <= start ? 0 : (begin - start + stride - 1) / stride;
      const int64_t last = end <= start ? 0 : (end - start + stride - 1) / stride;
      if (first < last) phase_rows(window, image, v, first, last - first, ahead);
    }
  }

  void phase_rows(const Window& window, int64_t image, size_t v, int64_t begin, int64_t count,
                  DepthwiseAhead& ahead) const {
    const Phase& vertical = vertical_[v];
    std::vector<const float*> rows(count +
                                   std::max<int64_t>(0, vertical.taps - 1) * vertical.tap_step);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int64_t p = vertical.first + begin + static_cast<int64_t>(i);
      rows[i] = p >= 0 && p < s_.out_height ? row(window, p) : nullptr;
    }
    const int64_t h = vertical.start + begin * s_.stride_height;
    float* to = pass_.grad_input + (image * s_.height + h) * input_row(s_);
    for (size_t i = 0; i < horizontal_.size(); ++i) {
      const Phase& horizontal = horizontal_[i];
      if (horizontal.start >= s_.width) continue;
      DepthwiseForward d{};
      d.taps = {.input = rows.data(),
                .rows = vertical.taps,
                .row_step = 1,
                .row_tap_step = vertical.tap_step,
                .taps = horizontal.taps,
                .step = 1,
                .tap_step = horizontal.tap_step,
                .first = horizontal.first,
                .width = s_.out_width,
                .channels = s_.channels};
      d.weight = weights_[v * horizontal_.size() + i].data();
      d.output = to + horizontal.start * s_.channels;
      d.height = count;
      d.width = (s_.width - horizontal.start + s_.stride_width - 1) / s_.stride_width;
      d.output_row = s_.stride_height * input_row(s_);
      d.output_step = s_.stride_width * s_.channels;
      d.output_ahead = ahead;
      d.streamed = streamed_;
      ahead.data = static_cast<const char*>(ahead.data) + ahead.size;
      cpu_kernels().depthwise->forward(d);
    }
  }

  const float* row(const Window& window, int64_t p) const {
    return window.data + p % window.size * output_row(s_);
  }

  // The taps of a pair of phases, in the order the kernel meets them.
  std::vector<float> packed(const Phase& v, const Phase& h) const {
    std::vector<float> result(groups(s_) * v.taps * h.taps * kDepthwiseGroup);
    for (int64_t c = 0; c < s_.channels; ++c) {
      float* to = result.data() + c / kDepthwiseGroup * v.taps * h.taps * kDepthwiseGroup +
                  c % kDepthwiseGroup;
      for (int64_t r = 0; r < v.taps; ++r) {
        for (int64_t t = 0; t < h.taps; ++t, to += kDepthwiseGroup) {
          const int64_t tap = (v.last - r * v.step) * s_.kernel_width + h.last - t * h.step;
          *to = pass_.weight[c * taps(s_) + tap];
        }
      }
    }
    return result;
  }

  const Shape& s_;
  const ConvolutionBackward& pass_;
  int64_t rows_, blocks_;  // output rows of a block, and blocks of an image
  std::vector<Phase> vertical_, horizontal_;
  bool streamed_;                            // the gradient of the input
  std::vector<std::vector<float>> weights_;  // per pair of phases
};

}  // namespace

void backward(const Shape& shape, const ConvolutionBackward& pass) { Backward(shape, pass).run(); }

}  // namespace torchweld::ops::depthwise
