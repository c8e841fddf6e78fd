// The transforms of Winograd's convolution: every instruction set against the scalar one, over all
// positions of a window on small images and ragged numbers of channels; and the scalar one, with
// products between the transforms, against the convolution and its gradients in double.
#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr DType kFloat = DType::float32;
constexpr int64_t kChannels[] = {1, 3, 16, 20, 37, 64};
constexpr int64_t kPixelGap = 3;  // floats between the channels of one pixel and the next

struct Image {
  int64_t height, width, channels;
  int64_t pixel() const { return channels + kPixelGap; }
  int64_t size() const { return (height * width - 1) * pixel() + channels; }
};

const WinogradKernels& kernels_of(Capability capability) { return *table(capability).winograd; }

// The points' matrices lie so close that one channel too many would land in the next.
Buffer points_of(int64_t channels, unsigned seed) {
  return Buffer(kWinogradPoints * channels, kFloat, seed, true);
}

void check_activations(const Image& image, int64_t y, int64_t x, bool epilogue) {
  const Buffer in(image.size(), kFloat, 1, true), bias(image.channels, kFloat, 2, true),
      residual(image.size(), kFloat, 3, true), points = points_of(image.channels, 4);
  const WinogradWindow window{image.height, image.width, image.pixel(), y, x};
  Epilogue e;
  if (epilogue) e = {bias.as<float>(), residual.as<float>(), -0.5f, 0.75f};

  struct Results {
    Buffer input, grad_output, output;
  };
  const auto run = [&](Capability capability) {
    Results r{points_of(image.channels, 5), points_of(image.channels, 6),
              Buffer(image.size(), kFloat, 7)};
    const WinogradKernels& k = kernels_of(capability);
    k.input(in.as<float>(), window, image.channels, r.input.as<float>(), image.channels);
    k.grad_output(in.as<float>(), window, image.channels, r.grad_output.as<float>(),
                  image.channels);
    k.output(points.as<float>(), image.channels, image.channels, r.output.as<float>(), window, e);
    return r;
  };
  const Results expected = run(Capability::scalar);
  for (Capability capability : available_capabilities()) {
    const Results r = run(capability);
    CHECK(r.input == expected.input && r.grad_output == expected.grad_output &&
              r.output == expected.output,
          "%s: image %ld x %ld x %ld, window at %ld, %ld", name(capability),
          static_cast<long>(image.height), static_cast<long>(image.width),
          static_cast<long>(image.channels), static_cast<long>(y), static_cast<long>(x));
  }

  // Outside the window and between the pixels nothing is written.
  const Buffer before(image.size(), kFloat, 7);
  for (int64_t i = 0; i < image.size(); ++i) {
    const int64_t pixel = i / image.pixel(), row = pixel / image.width - y;
    const int64_t column = pixel % image.width - x;
    const bool inside = i % image.pixel() < image.channels && row >= 0 && row < kWinogradTile &&
                        column >= 0 && column < kWinogradTile;
    const float value = expected.output.as<float>()[i];
    if (!inside) CHECK(value == before.as<float>()[i], "written at %ld", static_cast<long>(i));
    if (inside && epilogue) CHECK(value >= -0.5f && value <= 0.75f, "not clamped: %g", value);
  }
}

// In bfloat16: the same numbers, each rounded once.
void check_bfloat16(const Image& image, int64_t y, int64_t x) {
  constexpr DType kBFloat16 = DType::bfloat16;
  const Buffer in(image.size(), kBFloat16, 1, true), bias(image.channels, kFloat, 2, true),
      residual(image.size(), kBFloat16, 3, true), points = points_of(image.channels, 4);
  const Buffer in_float = widened(in), residual_float = widened(residual);
  const WinogradWindow window{image.height, image.width, image.pixel(), y, x};
  for (Capability capability : available_capabilities()) {
    const WinogradKernels& k = kernels_of(capability);
    const Buffer gathered = points_of(image.channels, 5), expected = points_of(image.channels, 5);
    k.input_bf16(in.as<BFloat16>(), window, image.channels, gathered.as<float>(), image.channels);
    k.input(in_float.as<float>(), window, image.channels, expected.as<float>(), image.channels);
    CHECK(gathered == expected, "%s: input in bfloat16", name(capability));

    const Buffer output(image.size(), kBFloat16), output_float(image.size(), kFloat);
    k.output_bf16(points.as<float>(), image.channels, image.channels, output.as<BFloat16>(), window,
                  {bias.as<float>(), residual.as<BFloat16>(), -0.5f, 0.75f});
    k.output(points.as<float>(), image.channels, image.channels, output_float.as<float>(), window,
             {bias.as<float>(), residual_float.as<float>(), -0.5f, 0.75f});
    CHECK(output == rounded(output_float), "%s: output in bfloat16", name(capability));
  }
}

void check_weights(int64_t rows, int64_t columns) {
  const int64_t width = (columns + kPanelGroup - 1) / kPanelGroup * kPanelGroup;
  // A tap's rows lie together in one layout, a row's taps in the other, as turned weights do.
  const WinogradTaps by_tap{3 * rows * columns, rows * columns, columns};
  const WinogradTaps turned{-3 * columns, -columns, 9 * columns};
  const int64_t size = 9 * rows * columns;
  const Buffer weight(size, kFloat, 1, true), sums = points_of(rows * columns, 2);
  struct Results {
    Buffer points, turned, gradient;
  };
  const auto run = [&](Capability capability) {
    Results r{points_of(rows * width, 3), points_of(rows * width, 4), Buffer(size, kFloat)};
    const WinogradKernels& k = kernels_of(capability);
    k.weight(weight.as<float>(), by_tap, rows, columns, r.points.as<float>(), rows * width, width);
    k.weight(weight.as<float>() + 8 * columns, turned, rows, columns, r.turned.as<float>(),
             rows * width, width);
    k.grad_weight(sums.as<float>(), rows * columns, rows, columns, r.gradient.as<float>(),
                  {3 * columns, columns, 9 * columns});
    return r;
  };
  const Results expected = run(Capability::scalar);
  for (Capability capability : available_capabilities()) {
    const Results r = run(capability);
    CHECK(r.points == expected.points && r.turned == expected.turned &&
              r.gradient == expected.gradient,
          "%s: weights %ld x %ld", name(capability), static_cast<long>(rows),
          static_cast<long>(columns));
  }
  for (int64_t i = 0; i < kWinogradPoints * rows * width; ++i) {
    if (i % width >= columns) CHECK(expected.points.as<float>()[i] == 0, "column not zero");
  }
}

// One tile of a padded 4 x 4 image of one channel, with one output channel.
void check_convolution() {
  const WinogradKernels& k = kernels_of(Capability::scalar);
  const Buffer image(16, kFloat, 1, true), weight(9, kFloat, 2, true), grad(16, kFloat, 3, true);
  const auto pixel = [&](int64_t y, int64_t x) {
    return y >= 0 && y < 4 && x >= 0 && x < 4 ? image.as<float>()[y * 4 + x] : 0.0;
  };
  const WinogradWindow patch{4, 4, 1, -1, -1}, tile{4, 4, 1, 0, 0};
  const WinogradTaps taps{3, 1, 1};
  const Buffer inputs = points_of(1, 4), grads = points_of(1, 5), products = points_of(1, 6);
  const Buffer weights = points_of(kPanelGroup, 7);
  Buffer output(16, kFloat), grad_weight(9, kFloat);

  k.input(image.as<float>(), patch, 1, inputs.as<float>(), 1);
  k.weight(weight.as<float>(), taps, 1, 1, weights.as<float>(), kPanelGroup, kPanelGroup);
  for (int64_t p = 0; p < kWinogradPoints; ++p) {
    products.as<float>()[p] = inputs.as<float>()[p] * weights.as<float>()[p * kPanelGroup];
  }
  k.output(products.as<float>(), 1, 1, output.as<float>(), tile, {});
  for (int64_t i = 0; i < 16; ++i) {
    double sum = 0;
    for (int64_t t = 0; t < 9; ++t) {
      sum += weight.as<float>()[t] * pixel(i / 4 + t / 3 - 1, i % 4 + t % 3 - 1);
    }
    CHECK(std::fabs(output.as<float>()[i] - sum) < 3e-6, "output %ld: %g, not %g",
          static_cast<long>(i), output.as<float>()[i], sum);
  }

  k.grad_output(grad.as<float>(), tile, 1, grads.as<float>(), 1);
  for (int64_t p = 0; p < kWinogradPoints; ++p) {
    products.as<float>()[p] = inputs.as<float>()[p] * grads.as<float>()[p];
  }
  k.grad_weight(products.as<float>(), 1, 1, 1, grad_weight.as<float>(), taps);
  for (int64_t t = 0; t < 9; ++t) {
    double sum = 0;
    for (int64_t i = 0; i < 16; ++i) {
      sum += grad.as<float>()[i] * pixel(i / 4 + t / 3 - 1, i % 4 + t % 3 - 1);
    }
    CHECK(std::fabs(grad_weight.as<float>()[t] - sum) < 1e-5, "weight gradient %ld: %g, not %g",
          static_cast<long>(t), grad_weight.as<float>()[t], sum);
  }
}

}  // namespace

int main() {
  check_convolution();
  for (int64_t channels : kChannels) {
    check_weights(1, channels);
    check_weights(5, channels);
    for (int64_t size : {1, 3, 4, 7}) {
      for (int64_t y = -2; y < size; ++y) {
        for (int64_t x = -2; x < size; x += 3) {
          check_activations({size, size + 1, channels}, y, x, x % 2 == 0);
          check_bfloat16({size, size + 1, channels}, y, x);
        }
      }
    }
    check_activations({8, 9, channels}, 1, 2, true);  // all of a patch inside
    check_bfloat16({8, 9, channels}, 1, 2);
  }
}
