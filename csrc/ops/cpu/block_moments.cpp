#include "ops/cpu/block_moments.h"

#include <algorithm>
#include <numeric>

#include "ops/kernels.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace {

// The kernel's loop over registers is worth starting for this many columns.
constexpr int64_t kWideEnough = 64;

// Adds `part` values per channel to statistics of `count` others, by Chan's formula.
void merge(double count, double part, int64_t channels, const double* part_mean,
           const double* part_m2, double* mean, double* m2) {
  const double weight = part / (count + part);
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = part_mean[c] - mean[c];
    mean[c] += delta * weight;
    m2[c] += part_m2[c] + delta * delta * (count * weight);
  }
}

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
  double* counts = partials_.data() + 3 * block * channels_ + first;
  double *mean = counts + channels_, *m2 = mean + channels_;
  const double count = counts[0];
  std::fill_n(counts, columns, count + static_cast<double>(pixels));

  // Several pixels to a row where few channels would leave registers empty.
  int64_t copies = 1;
  if (columns == row && columns < kWideEnough) {
    copies = kernels::kColumnGroup / std::gcd(columns, kernels::kColumnGroup);
    while (copies * columns < kWideEnough) copies *= 2;
    if (copies > pixels) copies = 1;
  }
  const int64_t rows = pixels / copies;
  if (copies == 1) return kernel(data, {rows, columns, row}, count, mean, m2);

  std::vector<double> means(copies * columns), m2s(copies * columns);
  kernel(data, {rows, copies * columns, copies * row}, 0, means.data(), m2s.data());
  const double part = static_cast<double>(rows);
  for (int64_t i = 0; i < copies; ++i) {
    merge(count + i * part, part, columns, means.data() + i * columns, m2s.data() + i * columns,
          mean, m2);
  }
  const int64_t left = pixels - rows * copies;
  if (left > 0) {
    kernel(data + rows * copies * row, {left, columns, row}, count + copies * part, mean, m2);
  }
}

Moments BlockMoments::merged() const {
  Moments result{0, Channels(channels_), Channels(channels_)};
  if (channels_ == 0) return result;
  parallel_for(channels_, 64, [&](int64_t begin, int64_t end) {
    double count = 0;
    for (int64_t block = 0; block < blocks_; ++block) {
      const double* p = partials_.data() + 3 * block * channels_ + begin;
      if (p[0] == 0) continue;
      merge(count, p[0], end - begin, p + channels_, p + 2 * channels_, result.mean.data() + begin,
            result.m2.data() + begin);
      count += p[0];
    }
  });
  for (int64_t block = 0; block < blocks_; ++block) {
    result.count += partials_[3 * block * channels_];
  }
  return result;
}

}  // namespace torchweld::ops
