// Max pooling: every instruction set against plain loops, over channel counts with ragged ends, and
// windows cut off by the borders, with gaps between them, dilated, and of padding alone.
#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

struct Case {
  int64_t channels, height, width;  // of the input
  int64_t taps_high, taps_wide, stride, padding, dilation;

  int64_t out(int64_t size, int64_t taps) const {
    return (size + 2 * padding - dilation * (taps - 1) - 1) / stride + 1;
  }
  int64_t out_height() const { return out(height, taps_high); }
  int64_t out_width() const { return out(width, taps_wide); }
};

constexpr Case kCases[] = {
    {16, 8, 8, 2, 2, 2, 0, 1},  {64, 9, 11, 3, 3, 2, 1, 1}, {33, 7, 5, 2, 2, 2, 1, 1},
    {5, 6, 9, 3, 3, 1, 1, 1},   {17, 10, 9, 3, 2, 3, 1, 2}, {40, 11, 7, 5, 4, 2, 2, 1},
    {1, 3, 3, 3, 3, 2, 0, 1},   {15, 1, 1, 2, 2, 1, 1, 2},  {48, 5, 6, 2, 3, 4, 1, 1},
    {7, 13, 12, 3, 3, 2, 1, 3}, {31, 4, 9, 1, 1, 1, 0, 1},  {16, 16, 16, 16, 16, 16, 0, 1},
};

// Taps of windows, or windows that cover, by trying all of them.
struct Axis {
  std::vector<PoolRun> runs;
  PoolAxis axis;

  Axis(const Case& c, int64_t size, int64_t outputs, int64_t taps, bool backward)
      : axis{nullptr, 1, 1, taps, c.stride, c.padding, c.dilation} {
    std::vector<int64_t> steps, tap_steps;
    for (int64_t to = 0; to < (backward ? size : outputs); ++to) {
      PoolRun run{0, 0, 0};
      int64_t before = 0, tap_before = 0;
      for (int64_t from = 0; from < (backward ? outputs : size); ++from) {
        const int64_t in = backward ? to : from, out = backward ? from : to;
        const int64_t place = in + c.padding - out * c.stride;
        if (place < 0 || place % c.dilation || place / c.dilation >= taps) continue;
        const int64_t tap = place / c.dilation;
        if (run.count == 0) {
          run = {from, 0, tap};
        } else {
          axis.step = from - before;
          axis.tap_step = tap - tap_before;
        }
        before = from;
        tap_before = tap;
        ++run.count;
      }
      runs.push_back(run);
    }
    axis.runs = runs.data();
  }
};

template <class T>
MaxPool2dOf<T> arguments(const Case& c, const Axis& rows, const Axis& columns, bool backward,
                         const Buffer& from, const Buffer& to) {
  return {.rows = rows.axis,
          .columns = columns.axis,
          .begin = 0,
          .end = backward ? c.height : c.out_height(),
          .width = backward ? c.width : c.out_width(),
          .source_width = backward ? c.out_width() : c.width,
          .channels = c.channels,
          .source = from.as<T>(),
          .destination = to.as<T>()};
}

// Few values, so that there are ties; some NaN, some -inf. They are bfloat16's as well.
Buffer image(int64_t size) {
  Buffer buffer(size, DType::float32, 1);
  std::mt19937 random(2);
  for (int64_t i = 0; i < size; ++i) {
    const unsigned kind = random() % 16;
    float value = static_cast<float>(random() % 7) - 3.0f;
    if (kind == 0) value = std::numeric_limits<float>::quiet_NaN();
    if (kind < 4 && kind > 0) value = -std::numeric_limits<float>::infinity();
    buffer.as<float>()[i] = value;
  }
  return buffer;
}

struct Expected {
  Buffer output, positions, grad_input;
};

Expected expect(const Case& c, const Buffer& input, const Buffer& grad) {
  const int64_t outputs = c.out_height() * c.out_width() * c.channels;
  Expected e{{outputs, DType::float32},
             {(outputs + 1) / 2, DType::bfloat16},
             {c.height * c.width * c.channels, DType::float32}};
  std::fill_n(e.grad_input.as<float>(), c.height * c.width * c.channels, 0.0f);
  for (int64_t o = 0; o < outputs; ++o) {
    const int64_t ch = o % c.channels, q = o / c.channels % c.out_width();
    const int64_t p = o / c.channels / c.out_width();
    float best = -std::numeric_limits<float>::infinity();
    int64_t position = -1, place = -1;
    for (int64_t t = 0; t < c.taps_high * c.taps_wide; ++t) {
      const int64_t h = p * c.stride - c.padding + t / c.taps_wide * c.dilation;
      const int64_t w = q * c.stride - c.padding + t % c.taps_wide * c.dilation;
      if (h < 0 || h >= c.height || w < 0 || w >= c.width) continue;
      const int64_t at = (h * c.width + w) * c.channels + ch;
      const float value = input.as<float>()[at];
      if (place >= 0 && !(value > best) && !std::isnan(value)) continue;
      best = value;
      position = t;
      place = at;
    }
    e.output.as<float>()[o] = best;
    e.positions.as<uint8_t>()[o] = static_cast<uint8_t>(position);
    if (place >= 0) e.grad_input.as<float>()[place] += grad.as<float>()[o];
  }
  return e;
}

bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void check_case(const MaxPool2dKernels& kernels, const Case& c, int isa) {
  const int64_t inputs = c.height * c.width * c.channels;
  const int64_t outputs = c.out_height() * c.out_width() * c.channels;
  const Buffer input = image(inputs);
  Buffer grad(outputs, DType::float32, 3, true);
  // Sums of these are exact in any format.
  for (int64_t i = 0; i < outputs; ++i) grad.as<float>()[i] = static_cast<float>(i % 5) - 2.0f;
  const Expected expected = expect(c, input, grad);
  const Axis rows(c, c.height, c.out_height(), c.taps_high, false);
  const Axis columns(c, c.width, c.out_width(), c.taps_wide, false);
  const Axis row_covers(c, c.height, c.out_height(), c.taps_high, true);
  const Axis column_covers(c, c.width, c.out_width(), c.taps_wide, true);

  for (const bool bf16 : {false, true}) {
    const Buffer low_input = rounded(input), low_grad = rounded(grad);
    const Buffer &from = bf16 ? low_input : input, &gradient = bf16 ? low_grad : grad;
    const DType type = bf16 ? DType::bfloat16 : DType::float32;
    Buffer output(outputs, type), alone(outputs, type), grad_input(inputs, type);
    const std::unique_ptr<uint8_t[]> positions(new uint8_t[outputs]);
    if (bf16) {
      using T = BFloat16;
      kernels.forward_bf16(arguments<T>(c, rows, columns, false, from, output), positions.get());
      kernels.forward_bf16(arguments<T>(c, rows, columns, false, from, alone), nullptr);
      kernels.backward_bf16(arguments<T>(c, row_covers, column_covers, true, gradient, grad_input),
                            positions.get());
    } else {
      using T = float;
      kernels.forward(arguments<T>(c, rows, columns, false, from, output), positions.get());
      kernels.forward(arguments<T>(c, rows, columns, false, from, alone), nullptr);
      kernels.backward(arguments<T>(c, row_covers, column_covers, true, gradient, grad_input),
                       positions.get());
    }
    CHECK(output == alone, "isa %d, %d channels: outputs differ without positions", isa,
          static_cast<int>(c.channels));
    const Buffer values = bf16 ? widened(output) : std::move(output);
    const Buffer gradients = bf16 ? widened(grad_input) : std::move(grad_input);
    for (int64_t o = 0; o < outputs; ++o) {
      const float right = expected.output.as<float>()[o];
      CHECK(same(values.as<float>()[o], right), "isa %d, output %d: %g, not %g", isa,
            static_cast<int>(o), values.as<float>()[o], right);
      const int got = positions[o], want = expected.positions.as<uint8_t>()[o];
      CHECK(got == want || want == 255, "isa %d, position %d: %d, not %d", isa, static_cast<int>(o),
            got, want);
    }
    for (int64_t i = 0; i < inputs; ++i) {
      const float got = gradients.as<float>()[i], want = expected.grad_input.as<float>()[i];
      CHECK(got == want, "isa %d, gradient %d: %g, not %g", isa, static_cast<int>(i), got, want);
    }
  }
}

}  // namespace

int main() {
  for (const Capability capability : available_capabilities()) {
    for (const Case& c : kCases) {
      check_case(*table(capability).max_pool2d, c, static_cast<int>(capability));
    }
  }
  std::puts("max_pool2d: ok");
  return 0;
}
