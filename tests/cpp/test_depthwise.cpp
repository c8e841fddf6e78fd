// Depthwise rows: every instruction set against plain loops of the same chains of multiply-adds,
// over channel counts and widths with ragged ends, rows that are missing, strides and dilations.
#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

struct Case {
  int64_t channels, height, width;  // of the input
  int64_t kernel_height, kernel_width, stride, padding, dilation;

  int64_t out(int64_t size, int64_t kernel) const {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  }
  int64_t out_height() const { return out(height, kernel_height); }
  int64_t out_width() const { return out(width, kernel_width); }
  int64_t groups() const { return (channels + kDepthwiseGroup - 1) / kDepthwiseGroup; }
  int64_t packed() const { return groups() * kernel_height * kernel_width * kDepthwiseGroup; }
  int64_t tap(int64_t c, int64_t r, int64_t s) const {
    const int64_t row = (c / kDepthwiseGroup * kernel_height + r) * kernel_width + s;
    return row * kDepthwiseGroup + c % kDepthwiseGroup;
  }
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 1, 1, 0, 1},   {16, 5, 7, 3, 3, 1, 1, 1},   {40, 4, 30, 3, 3, 1, 1, 1},
    {9, 6, 14, 3, 3, 2, 1, 1},  {33, 7, 31, 3, 3, 2, 1, 1},  {24, 6, 19, 5, 5, 1, 2, 1},
    {17, 9, 33, 5, 5, 2, 2, 1}, {16, 2, 2, 5, 5, 1, 2, 1},   {20, 4, 16, 1, 2, 1, 0, 1},
    {3, 9, 9, 7, 7, 1, 3, 1},   {18, 12, 13, 3, 3, 3, 4, 2}, {8, 3, 3, 3, 3, 1, 3, 1},
    {64, 2, 8, 2, 1, 1, 0, 1},  {31, 5, 15, 3, 3, 1, 0, 1},  {16, 3, 1, 3, 3, 1, 1, 1},
};

struct Data {
  explicit Data(const Case& c)
      : input(c.height * c.width * c.channels, DType::float32, 1, true),
        weight(c.packed(), DType::float32, 2, true),
        bias(c.channels, DType::float32, 3, true),
        residual(c.out_height() * c.out_width() * c.channels, DType::float32, 4, true),
        grad(c.out_height() * c.out_width() * c.channels, DType::float32, 5, true) {
    const int64_t last = (c.out_height() - 1) * c.stride + (c.kernel_height - 1) * c.dilation;
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t h = i - c.padding;
      const bool inside = h >= 0 && h < c.height;
      rows.push_back(inside ? input.as<float>() + h * c.width * c.channels : nullptr);
    }
    for (int64_t p = 0; p < c.out_height(); ++p) {
      grad_rows.push_back(grad.as<float>() + p * c.out_width() * c.channels);
    }
    taps = {.input = rows.data(),
            .rows = c.kernel_height,
            .row_step = c.stride,
            .row_tap_step = c.dilation,
            .taps = c.kernel_width,
            .step = c.stride,
            .tap_step = c.dilation,
            .first = -c.padding,
            .width = c.width,
            .channels = c.channels};
  }

  // The input value a tap of channel ch meets; false outside the image.
  bool meets(const Case& c, int64_t ch, int64_t p, int64_t q, int64_t r, int64_t s,
             float& value) const {
    const float* row = rows[p * c.stride + r * c.dilation];
    const int64_t w = q * c.stride - c.padding + s * c.dilation;
    if (row == nullptr || w < 0 || w >= c.width) return false;
    value = row[w * c.channels + ch];
    return true;
  }

  Buffer input, weight, bias, residual, grad;
  std::vector<const float*> rows, grad_rows;
  DepthwiseTaps taps;
};

void check_forward(Capability capability, const Case& c, const Data& data, bool epilogue) {
  Buffer output(c.out_height() * c.out_width() * c.channels, DType::float32);
  DepthwiseForward d{};
  d.taps = data.taps;
  d.weight = data.weight.as<float>();
  d.output = output.as<float>();
  d.height = c.out_height();
  d.width = c.out_width();
  d.output_row = c.out_width() * c.channels;
  d.output_step = c.channels;
  if (epilogue) {
    d.epilogue = {data.bias.as<float>(), data.residual.as<float>(), -0.5f, 0.75f};
  }
  d.input_ahead = {data.input.as<float>(), c.width * c.channels * 4};
  table(capability).depthwise->forward(d);
  // Past the caches where a register is a line, and elsewhere as ever.
  for (const int64_t shift : {0, 4}) {
    const Aligned streamed(output, shift);
    d.output = streamed.as<float>();
    d.streamed = true;
    table(capability).depthwise->forward(d);
    CHECK(streamed == output, "%s: %ld channels, streamed", name(capability),
          static_cast<long>(c.channels));
  }

  int64_t i = 0;
  for (int64_t p = 0; p < c.out_height(); ++p) {
    for (int64_t q = 0; q < c.out_width(); ++q) {
      for (int64_t ch = 0; ch < c.channels; ++ch, ++i) {
        float sum = 0, value;
        for (int64_t r = 0; r < c.kernel_height; ++r) {
          for (int64_t s = 0; s < c.kernel_width; ++s) {
            if (!data.meets(c, ch, p, q, r, s, value)) continue;
            sum = std::fma(value, data.weight.as<float>()[c.tap(ch, r, s)], sum);
          }
        }
        if (epilogue) {
          sum = sum + data.bias.as<float>()[ch] + data.residual.as<float>()[i];
          sum = sum < -0.5f ? -0.5f : sum;
          sum = sum > 0.75f ? 0.75f : sum;
        }
        CHECK(output.as<float>()[i] == sum, "%s: %ld channels, pixel %ld, %ld, channel %ld: %g, %g",
              name(capability), static_cast<long>(c.channels), static_cast<long>(p),
              static_cast<long>(q), static_cast<long>(ch),
              static_cast<double>(output.as<float>()[i]), static_cast<double>(sum));
      }
    }
  }
}

// In bfloat16: the same numbers, each rounded once.
void check_bfloat16(Capability capability, const Case& c) {
  const int64_t row = c.width * c.channels, size = c.out_height() * c.out_width() * c.channels;
  const Buffer input(c.height * row, DType::bfloat16, 1, true), input_float = widened(input);
  const Buffer residual(size, DType::bfloat16, 4, true), residual_float = widened(residual);
  const Buffer output(size, DType::bfloat16), output_float(size, DType::float32);
  const Data data(c);
  std::vector<const float*> rows;
  std::vector<const BFloat16*> half_rows;
  for (const float* from : data.rows) {
    const int64_t offset = from == nullptr ? 0 : from - data.input.as<float>();
    rows.push_back(from == nullptr ? nullptr : input_float.as<float>() + offset);
    half_rows.push_back(from == nullptr ? nullptr : input.as<BFloat16>() + offset);
  }
  DepthwiseForward d{};
  d.taps = data.taps;
  d.taps.input = rows.data();
  d.weight = data.weight.as<float>();
  d.output = output_float.as<float>();
  d.height = c.out_height();
  d.width = c.out_width();
  d.output_row = c.out_width() * c.channels;
  d.output_step = c.channels;
  d.epilogue = {data.bias.as<float>(), residual_float.as<float>(), -0.5f, 0.75f};
  table(capability).depthwise->forward(d);

  const DepthwiseTaps& t = d.taps;
  const DepthwiseForwardOf<BFloat16> half{
      .taps = {half_rows.data(), t.rows, t.row_step, t.row_tap_step, t.taps, t.step, t.tap_step,
               t.first, t.width, t.channels},
      .weight = d.weight,
      .output = output.as<BFloat16>(),
      .height = d.height,
      .width = d.width,
      .output_row = d.output_row,
      .output_step = d.output_step,
      .epilogue = {data.bias.as<float>(), residual.as<BFloat16>(), -0.5f, 0.75f},
      .input_ahead = {},
      .output_ahead = {}};
  table(capability).depthwise->forward_bf16(half);
  CHECK(output == rounded(output_float), "%s: bfloat16, %ld channels", name(capability),
        static_cast<long>(c.channels));
}

void check_weight_gradient(Capability capability, const Case& c, const Data& data) {
  std::vector<float> sums(c.packed(), 0);
  std::vector<double> totals(c.packed(), 1);
  DepthwiseWeightGradient d{};
  d.taps = data.taps;
  d.grad = data.grad_rows.data();
  d.height = c.out_height();
  d.width = c.out_width();
  d.sums = sums.data();
  const DepthwiseKernels& kernels = *table(capability).depthwise;
  kernels.weight_gradient(d);
  kernels.flush(sums.data(), totals.data(), c.packed());

  for (int64_t ch = 0; ch < c.channels; ++ch) {
    for (int64_t r = 0; r < c.kernel_height; ++r) {
      for (int64_t s = 0; s < c.kernel_width; ++s) {
        float sum = 0, value;
        for (int64_t p = 0; p < c.out_height(); ++p) {
          float row = 0;
          for (int64_t q = 0; q < c.out_width(); ++q) {
            if (!data.meets(c, ch, p, q, r, s, value)) continue;
            row = std::fma(value, data.grad_rows[p][q * c.channels + ch], row);
          }
          sum += row;
        }
        const int64_t at = c.tap(ch, r, s);
        CHECK(totals[at] == 1 + static_cast<double>(sum) && sums[at] == 0,
              "%s: %ld channels, weight %ld, %ld, %ld: %g, %g", name(capability),
              static_cast<long>(c.channels), static_cast<long>(ch), static_cast<long>(r),
              static_cast<long>(s), totals[at] - 1, static_cast<double>(sum));
      }
    }
  }
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    const Data data(c);
    for (Capability capability : available_capabilities()) {
      check_forward(capability, c, data, false);
      check_forward(capability, c, data, true);
      check_bfloat16(capability, c);
      check_weight_gradient(capability, c, data);
    }
  }
}
