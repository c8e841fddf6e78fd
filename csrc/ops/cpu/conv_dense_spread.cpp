#include "ops/cpu/conv_dense_spread.h"

#include "ops/kernels.h"

namespace torchweld::ops::dense {
namespace {

using kernels::kPanel;
using kernels::kPanelGroup;

// The floats of a row of the ring are planes of as many pixels.
int64_t plane_of(const ConvolutionShape& s) {
  const int64_t reach =
      (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width;
  const int64_t width = std::max(s.padding_width + s.width, reach + 1);
  // What is added is whole registers.
  return divide_up(width, s.stride_width) + kPanelGroup;
}

}  // namespace

Spread::Spread(const Plan& plan, const float* weight)
    : plan_(plan),
      weight_(weight),
      plane_(plane_of(plan.shape())),
      margin_(round_up(offset(plan.shape().kernel_width - 1), kPanelGroup) + kPanelGroup),
      width_(margin_ + kPanel + margin_),
      slots_(plan.input_rows(plan.block_rows())),
      rows_((slots_ + 1) * plan.shape().channels * plan.shape().stride_width * plane_),
      columns_(kPanel * plan.shape().out_channels),
      products_(plan.steps() * width_),
      sources_(plan.shape().kernel_width) {
  const ConvolutionShape& s = plan.shape();
  std::fill_n(rows_.data(), (slots_ + 1) * s.channels * s.stride_width * plane_, 0.0f);
  std::fill_n(products_.data(), plan.steps() * width_, 0.0f);
}

float* Spread::row(int64_t row) {
  const ConvolutionShape& s = plan_.shape();
  const bool inside = row >= 0 && row < s.height;
  return rows_.data() + (inside ? row % slots_ : slots_) * s.channels * s.stride_width * plane_;
}

// The products of up to a panel of pixels.
void Spread::multiply(const float* gradient, int64_t pixels) {
  const int64_t channels = plan_.shape().out_channels, width = round_up(pixels, kPanelGroup);
  const auto& kernels = *cpu_kernels().gemm;
  for (int64_t i = 0; pixels < filled_ && i < plan_.steps(); ++i) {
    std::fill_n(products_.data() + i * width_ + margin_ + pixels, filled_ - pixels, 0.0f);
  }
  filled_ = pixels;
  kernels.pack(gradient, channels, pixels, channels, columns_.data(), width);
  kernels.gemm({.rows = plan_.steps(),
                .columns = pixels,
                .a = &weight_,
                .runs = 1,
                .depth = channels,
                .a_row = 1,
                .a_step = plan_.steps(),
                .b = columns_.data(),
                .b_row = width,
                .c = products_.data() + margin_,
                .c_row = width_,
                .accumulate = false});
}

// Adds the taps of a kernel row to a row of the image.
void Spread::add_row(int64_t row, int64_t r, int64_t column, int64_t pixels) {
  const ConvolutionShape& s = plan_.shape();
  const float* products = products_.data() + r * s.kernel_width * s.channels * width_ + margin_;
  float* planes = this->row(row) + column;
  for (int64_t phase = 0; phase < s.stride_width; ++phase) {
    for (int64_t c = 0; c < s.channels; ++c) {
      int64_t taps = 0, first = 0, last = 0;
      for (int64_t tap = 0; tap < s.kernel_width; ++tap) {
        if (tap * s.dilation_width % s.stride_width != phase) continue;
        last = offset(tap);
        if (taps == 0) first = last;
        sources_[taps++] = products + (tap * s.channels + c) * width_ - (last - first);
      }
      if (taps == 0) continue;
      float* to = planes + (c * s.stride_width + phase) * plane_ + first;
      cpu_kernels().gemm->add_rows(sources_.data(), taps, pixels + last - first, to);
    }
  }
}

void Spread::add(const Block& block, const float* gradient, float* grad_input) {
  const ConvolutionShape& s = plan_.shape();
  const int64_t top = block.row * s.stride_height - s.padding_height;
  finish_rows(std::min(top, s.height), grad_input);
  for (int64_t i = 0; i < block.rows; ++i) {
    for (int64_t first = 0; first < block.columns; first += kPanel) {
      const int64_t pixels = std::min(kPanel, block.columns - first);
      multiply(gradient + (i * block.columns + first) * s.out_channels, pixels);
      for (int64_t r = 0; r < s.kernel_height; ++r) {
        add_row(top + i * s.stride_height + r * s.dilation_height, r, block.column + first, pixels);
      }
    }
  }
  if (block.row + block.rows == s.out_height && block.column + block.columns == s.out_width) {
    finish_rows(s.height, grad_input);
    finished_ = 0;
  }
}

void Spread::finish_rows(int64_t end, float* grad_input) {
  const ConvolutionShape& s = plan_.shape();
  for (; finished_ < end; ++finished_) {
    float* from = row(finished_);
    float* to = grad_input + finished_ * s.width * s.channels;
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t phase = 0; phase < s.stride_width; ++phase, from += plane_) {
        // Pixel w is padding_width + w of its padded row.
        int64_t i = divide_up(std::max<int64_t>(0, s.padding_width - phase), s.stride_width);
        int64_t w = i * s.stride_width + phase - s.padding_width;
        for (; w < s.width; w += s.stride_width, ++i) to[w * s.channels + c] = from[i];
        std::fill_n(from, plane_, 0.0f);
      }
    }
  }
}

}  // namespace torchweld::ops::dense
