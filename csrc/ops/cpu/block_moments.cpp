#include "ops/cpu/block_moments.h"

#include <algorithm>
#include <numeric>

#include "ops/kernels.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace {

// Chan's formula: adds a part's values to a sum's.
struct Merge {
  double *count, *mean, *m2;

  void operator()(int64_t c, double part_count, double part_mean, double part_m2) const {
    const double total = count[c] + part_count;
    const double weight = part_count / total;
    const double delta = part_mean - mean[c];
    mean[c] += delta * weight;
    m2[c] += part_m2 + delta * delta * count[c] * weight;
    count[c] = total;
  }
};

}  // namespace

void BlockMoments::start(int64_t blocks, int64_t channels) {
  blocks_ = blocks;
  channels_ = channels;
  partials_.assign(3 * blocks * channels, 0);
}

void BlockMoments::add(int64_t block, const float* data, int64_t pixels, int64_t row, int64_t first,
                       int64_t columns) {
  const auto kernel =
      cpu_kernels().conv_bn_relu->statistics[static_cast<size_t>(kernels::Layout::columns)]
                                            [static_cast<size_t>(kernels::DType::float32)];
  double* partial = partials_.data() + 3 * block * channels_ + first;
  const Merge merge{partial, partial + channels_, partial + 2 * channels_};
  double mean[kernels::kMaxColumns], m2[kernels::kMaxColumns];

  // Several pixels to a row where few channels would leave registers empty.
  int64_t copies = 1;
  if (columns == row) {
    copies = kernels::kColumnGroup / std::gcd(columns, kernels::kColumnGroup);
    while (2 * copies * columns <= kernels::kMaxColumns) copies *= 2;
    if (copies * columns > kernels::kMaxColumns || copies > pixels) copies = 1;
  }
  const int64_t rows = pixels / copies;
  const auto add_rows = [&](const float* from, int64_t count, int64_t copies_here) {
    const int64_t width = columns * copies_here;
    for (int64_t k = 0; k < width; k += kernels::kMaxColumns) {
      const int64_t size = std::min(kernels::kMaxColumns, width - k);
      kernel(from + k, {count, size, row * copies_here}, mean, m2);
      for (int64_t j = 0; j < size; ++j) {
        merge((k + j) % columns, static_cast<double>(count), mean[j], m2[j]);
      }
    }
  };
  if (rows > 0) add_rows(data, rows, copies);
  if (pixels % copies != 0) add_rows(data + rows * copies * row, 1, pixels % copies);
}

Moments BlockMoments::merged() const {
  Moments result{0, Channels(channels_), Channels(channels_)};
  Channels counts(channels_);
  const Merge merge{counts.data(), result.mean.data(), result.m2.data()};
  for (int64_t block = 0; block < blocks_; ++block) {
    const double* p = partials_.data() + 3 * block * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      if (p[c] > 0) merge(c, p[c], p[channels_ + c], p[2 * channels_ + c]);
    }
  }
  result.count = channels_ > 0 ? counts[0] : 0;
  return result;
}

}  // namespace torchweld::ops
