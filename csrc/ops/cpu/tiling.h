// How a dense [N, C, H, W] tensor is cut into spans for the conv_bn_relu kernels. The cuts depend
// on shape and memory order alone, never on the number of threads, so neither do the results.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "kernels/conv_bn_relu.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

class Tiling {
 public:
  struct Task {
    int64_t offset;  // of the first element, from the start of the tensor
    int64_t column;  // the first column it covers
    int64_t block;   // tasks of one block cover different columns of the same rows
    kernels::Runs runs;
  };

  explicit Tiling(const Tensor& x)
      : dtype_(*to_dtype(x.scalar_type())),
        channels_(x.size(1)),
        values_(x.size(0) * x.size(2) * x.size(3)) {
    const int64_t pixels = x.size(2) * x.size(3);
    // One pixel per plane, or one plane: memory is that of channels_last, whatever the strides are
    // called.
    if (x.numel() == 0) {
      layout_ = kernels::Layout::planes;
      columns_ = channels_;
    } else if (x.is_contiguous() && pixels != 1 && channels_ != 1) {
      cut_planes(x.size(0), pixels);
    } else {
      cut_columns();
    }
  }

  kernels::Layout layout() const { return layout_; }
  kernels::DType dtype() const { return dtype_; }
  int64_t channels() const { return channels_; }
  int64_t values_per_channel() const { return values_; }

  // f(task) for every task, in parallel.
  template <class F>
  void for_each_task(const F& f) const {
    const int64_t size = values_ * channels_ / std::max<int64_t>(1, tasks_.size());
    parallel_for(tasks_.size(), std::max<int64_t>(1, kTaskSize / std::max<int64_t>(1, size)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) f(tasks_[i]);
                 });
  }

  // f(task) over `count` pixels of a "columns" tensor, from any pixel on; offsets count from it.
  template <class F>
  void for_each_span(int64_t count, const F& f) const {
    const int64_t copies = columns_ / channels_;
    const auto rows = [&](int64_t offset, int64_t height, int64_t width) {
      for (int64_t k = 0; k < width; k += kernels::kMaxColumns) {
        const int64_t size = std::min(kernels::kMaxColumns, width - k);
        f(Task{offset + k, k, 0, {height, size, columns_}});
      }
    };
    if (count >= copies) rows(0, count / copies, columns_);
    if (count % copies != 0) {
      rows(count / copies * columns_, 1, count % copies * channels_);
    }
  }

  // Two doubles per column and block, for what a task finds out about its columns.
  std::vector<double> partials() const {
    return std::vector<double>(2 * blocks_.size() * columns_);
  }
  double* first(std::vector<double>& partials, const Task& task) const {
    return partials.data() + 2 * task.block * columns_ + task.column;
  }
  double* second(std::vector<double>& partials, const Task& task) const {
    return first(partials, task) + columns_;
  }

  // f(channel, values, first, second) for every partial result, each channel's in a fixed order;
  // channels in parallel.
  template <class F>
  void merge(const std::vector<double>& partials, const F& f) const {
    parallel_for(channels_, 16, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < static_cast<int64_t>(blocks_.size()); ++block) {
        const double* p = partials.data() + 2 * block * columns_;
        for (int64_t copy = 0; copy < blocks_[block].copies; ++copy) {
          for (int64_t channel = begin; channel < end; ++channel) {
            const int64_t k = copy * channels_ + channel;
            f(channel, blocks_[block].values, p[k], p[columns_ + k]);
          }
        }
      }
    });
  }

  // One value per channel as the kernels read them: in the arithmetic type, once per column.
  class Coefficients {
   public:
    template <class F>
    Coefficients(const Tiling& tiling, const F& value)
        : size_(size_of(tiling.dtype_) == 8 ? 8 : 4),
          lines_(size_ * (tiling.columns_ + kernels::kColumnGroup) / sizeof(Line) + 1) {
      for (int64_t c = 0; c < tiling.channels_; ++c) {
        for (int64_t k = c; k < tiling.columns_; k += tiling.channels_) {
          if (size_ == 8) {
            reinterpret_cast<double*>(lines_.data())[k] = value(c);
          } else {
            reinterpret_cast<float*>(lines_.data())[k] = static_cast<float>(value(c));
          }
        }
      }
    }
    const void* at(int64_t column) const { return lines_.data()->bytes + size_ * column; }

   private:
    // A register loaded across two cache lines costs twice; these are loaded for every row.
    struct alignas(64) Line {
      std::byte bytes[64];
    };
    int64_t size_;
    std::vector<Line> lines_;
  };

 private:
  // Elements a task takes: large enough to hide what a task costs, small enough for a second sweep
  // to find it in cache.
  static constexpr int64_t kTaskSize = 1 << 15;
  static constexpr int64_t kMaxPlane = 1 << 13;

  struct Block {
    int64_t values;  // per column
    int64_t copies;  // of the channels it covers
  };

  void cut_planes(int64_t planes, int64_t pixels) {
    layout_ = kernels::Layout::planes;
    columns_ = channels_;
    const int64_t size = std::min(pixels, kMaxPlane);
    const int64_t count = kTaskSize / size;
    for (int64_t c = 0; c < channels_; ++c) {
      int64_t block = 0;
      for (int64_t n = 0; n < planes; n += count) {
        for (int64_t i = 0; i < pixels; i += size, ++block) {
          const kernels::Runs runs{std::min(count, planes - n), std::min(size, pixels - i),
                                   channels_ * pixels};
          tasks_.push_back({(n * channels_ + c) * pixels + i, c, block, runs});
          if (c == 0) blocks_.push_back({runs.count * runs.size, 1});
        }
      }
    }
  }

  // Rows of one pixel's channels each; several pixels to a row where that makes whole registers,
  // and enough of them that the loop over a row is worth starting.
  void cut_columns() {
    layout_ = kernels::Layout::columns;
    int64_t copies = kernels::kColumnGroup / std::gcd(channels_, kernels::kColumnGroup);
    while (2 * copies * channels_ <= kernels::kMaxColumns) copies *= 2;
    columns_ = channels_ * copies;
    const int64_t rows = values_ / copies;
    const int64_t panel = std::min(columns_, kernels::kMaxColumns);
    const int64_t count = kTaskSize / panel;
    for (int64_t row = 0; row < rows; row += count)
      add_rows(row, std::min(count, rows - row), copies);
    if (values_ % copies != 0) add_rows(rows, 1, values_ % copies);
  }

  void add_rows(int64_t row, int64_t count, int64_t copies) {
    const int64_t width = channels_ * copies;
    for (int64_t k = 0; k < width; k += kernels::kMaxColumns) {
      tasks_.push_back({row * columns_ + k,
                        k,
                        static_cast<int64_t>(blocks_.size()),
                        {count, std::min(kernels::kMaxColumns, width - k), columns_}});
    }
    blocks_.push_back({count, copies});
  }

  kernels::DType dtype_;
  kernels::Layout layout_;
  int64_t channels_;
  int64_t values_;
  int64_t columns_ = 0;
  std::vector<Task> tasks_;
  std::vector<Block> blocks_;
};

}  // namespace torchweld::ops
