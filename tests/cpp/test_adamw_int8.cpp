// int8 AdamW states: the codec, the scales, and what a block does to its elements.
#include "adamw_run.h"

using namespace torchweld::kernels;

namespace {

constexpr AdamWMode kInt8{DType::float32, AdamWState::int8};

const AdamWKernels& kernels(Capability capability = detect_capability()) {
  return *table(capability).adamw;
}

// The distance from a code's value to the next one, in units of the block's scale.
double code_step(double magnitude, int top) {
  const double y = magnitude * code_value(top) + 8;
  return std::ldexp(1, std::ilogb(y) - 3) / code_value(top);
}

void check_step(int64_t size) {
  AdamWRun run(size, kInt8);
  run.fill(1);
  for (int k = 3; k <= 5; ++k) {
    const AdamWRun before(run);
    const AdamWScalars scalars = AdamWRun::scalars_of(k);
    run.step(scalars);
    for (int64_t b = 0; b < run.blocks(); ++b) {
      const int64_t end = std::min(size, (b + 1) * kAdamWBlock);
      double largest = 0;
      for (int64_t i = b * kAdamWBlock; i < end; ++i) {
        largest = std::max(largest, std::abs(before.grad(i)));
      }
      const double m_scale = 0.9 * before.m_scale[b] + 0.1 * largest;
      const double v_scale = 0.999 * before.v_scale[b] + 0.001 * largest * largest;
      CHECK(std::abs(run.m_scale[b] - m_scale) < 1e-6 * m_scale, "bound of exp_avg");
      CHECK(std::abs(run.v_scale[b] - v_scale) < 1e-6 * v_scale, "bound of exp_avg_sq");
      for (int64_t i = b * kAdamWBlock; i < end; ++i) {
        const ExactStep exact(before, i, scalars);
        const double m_step = code_step(std::abs(exact.m) / m_scale, 127) * m_scale;
        const double v_step = code_step(exact.v / v_scale, 255) * v_scale;
        CHECK(std::abs(run.exp_avg(i) - exact.m) <= 1.0001 * m_step, "%g: %g", exact.m,
              run.exp_avg(i));
        CHECK(std::abs(run.exp_avg_sq(i) - exact.v) <= 1.0001 * v_step, "%g: %g", exact.v,
              run.exp_avg_sq(i));
        CHECK(run.v[i] != 0 || (run.m[i] & 127) == 0, "v = 0 beside m != 0");
      }
    }
  }
}

void check_unbiased() {
  constexpr int kKeys = 4000;
  constexpr int64_t kSize = 20;
  AdamWRun start(kSize, kInt8);
  start.fill(2);
  double m_sum[kSize] = {}, v_sum[kSize] = {};
  for (int key = 0; key < kKeys; ++key) {
    AdamWRun run(start);
    run.step(AdamWRun::scalars_of(3, 1e-3, static_cast<uint64_t>(key)));
    for (int64_t i = 0; i < kSize; ++i) {
      m_sum[i] += run.exp_avg(i);
      v_sum[i] += run.exp_avg_sq(i);
    }
  }
  AdamWRun run(start);
  run.step(AdamWRun::scalars_of(3));
  for (int64_t i = 0; i < kSize; ++i) {
    const ExactStep exact(start, i, AdamWRun::scalars_of(3));
    const auto check = [&](double sum, double value, double scale, int top) {
      const double bound =
          5 * 0.5 * code_step(std::abs(value) / scale, top) * scale / std::sqrt(kKeys) +
          1e-5 * std::abs(value);
      CHECK(std::abs(sum / kKeys - value) <= bound, "mean %.9g, exactly %.9g", sum / kKeys, value);
    };
    check(m_sum[i], exact.m, run.m_scale[0], 127);
    check(v_sum[i], exact.v, run.v_scale[0], 255);
  }
}

void check_zeros_stay() {
  AdamWRun run(kAdamWBlock + 1, kInt8);
  run.set_weight(5, 2);
  run.set_grad(kAdamWBlock, 0.25);
  for (int k = 1; k <= 3; ++k) {
    AdamWScalars scalars = AdamWRun::scalars_of(k);
    scalars.decay = 1;
    run.step(scalars);
  }
  for (int64_t i = 0; i < kAdamWBlock; ++i) {
    CHECK(run.exp_avg(i) == 0 && run.exp_avg_sq(i) == 0, "a block without gradients");
    CHECK(run.weight(i) == (i == 5 ? 2 : 0), "its weights stay");
  }
  // A block of one: its scale is its value, but for a code's rounding of none.
  const double m = 0.25 * (1 - std::pow(0.9, 3)), v = 0.0625 * (1 - std::pow(0.999, 3));
  CHECK(std::abs(run.exp_avg(kAdamWBlock) - m) < 1e-5 * m, "%g", run.exp_avg(kAdamWBlock));
  CHECK(std::abs(run.exp_avg_sq(kAdamWBlock) - v) < 1e-5 * v, "%g", run.exp_avg_sq(kAdamWBlock));
  CHECK(std::abs(run.weight(kAdamWBlock) + 3e-3) < 1e-7, "three full steps");
}

// Gradients over many orders of magnitude in one block, as rare words of an embedding have.
void check_wide_range_trains() {
  AdamWRun run(kAdamWBlock, kInt8);
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (int k = 1; k <= 300; ++k) {
    for (int64_t i = 0; i < kAdamWBlock; ++i) {
      run.set_grad(i, std::pow(10, -8.0 * i / kAdamWBlock) * (1 + 0.1 * normal(random)));
    }
    AdamWScalars scalars = AdamWRun::scalars_of(k);
    scalars.decay = 1;
    scalars.eps = 0;
    const AdamWRun before(run);
    run.step(scalars);
    for (int64_t i = 0; i < kAdamWBlock; ++i) {
      CHECK(std::abs(run.weight(i) - before.weight(i)) < 5e-3, "an update explodes: %g",
            run.weight(i) - before.weight(i));
    }
  }
  // Constant gradients: every weight moves lr a step. Down to 1e-4 of the largest, so here.
  for (int64_t i = 0; i < kAdamWBlock / 2; ++i) {
    CHECK(std::abs(run.weight(i) / -0.3 - 1) < 0.15, "element %ld moved %g", static_cast<long>(i),
          run.weight(i));
  }
}

void check_nonfinite_spreads_in_its_block() {
  for (double bad : {double{NAN}, double{INFINITY}}) {
    for (Capability capability : available_capabilities()) {
      AdamWRun run(3 * kAdamWBlock, kInt8);
      run.fill(4);
      AdamWRun expected(run);
      run.set_grad(kAdamWBlock + 9, bad);
      run.step(AdamWRun::scalars_of(3), capability);
      expected.step(AdamWRun::scalars_of(3), capability);
      for (int64_t i = 0; i < run.size; ++i) {
        CHECK(
            i == kAdamWBlock + 9 ? std::isnan(run.weight(i)) : run.weight(i) == expected.weight(i),
            "at once, only the element");
      }
      run.set_grad(kAdamWBlock + 9, 0);
      run.step(AdamWRun::scalars_of(4), capability);
      expected.step(AdamWRun::scalars_of(4), capability);
      for (int64_t i = 0; i < run.size; ++i) {
        const bool hit = i / kAdamWBlock == 1;
        CHECK(hit ? !std::isfinite(run.weight(i)) : run.weight(i) == expected.weight(i),
              "then its block: element %ld, %g", static_cast<long>(i), run.weight(i));
      }
    }
  }
}

// Squares beyond float, and far below it.
void check_extreme_magnitudes() {
  for (double size : {1e30, 1e15, 1e-15, 1e-30}) {
    AdamWRun run(kAdamWBlock, kInt8);
    for (int k = 1; k <= 5; ++k) {
      for (int64_t i = 0; i < kAdamWBlock; ++i) run.set_grad(i, i % 2 ? size : -size / 3);
      run.step(AdamWRun::scalars_of(k));
      for (int64_t i = 0; i < kAdamWBlock; ++i) {
        CHECK(std::isfinite(run.weight(i)) && std::abs(run.weight(i)) < 1e-3 * k * 1.5,
              "gradient %g: %g", size, run.weight(i));
      }
    }
  }
}

void check_codes() {
  // Every code, through float and back.
  constexpr int64_t kSize = 256;
  Array<uint8_t> codes(kSize), again(kSize);
  Array<float> values(kSize), scale(1, 3.0f), scale_again(1);
  for (int64_t i = 0; i < kSize; ++i) codes[i] = static_cast<uint8_t>(i);
  for (Capability capability : available_capabilities()) {
    kernels(capability).decode_exp_avg(&codes[0], &scale[0], kSize, &values[0]);
    kernels(capability).encode_exp_avg(&values[0], kSize, &again[0], &scale_again[0]);
    for (int64_t i = 0; i < kSize; ++i) {
      const double magnitude = code_value(i & 127) / code_value(127) * 3;
      CHECK(std::abs(std::abs(values[i]) - magnitude) <= 1e-6 * magnitude, "value of %ld",
            static_cast<long>(i));
      CHECK(std::signbit(values[i]) == (i > 127), "sign of %ld", static_cast<long>(i));
    }
    CHECK(again == codes, "signed codes");
    kernels(capability).decode_exp_avg_sq(&codes[0], &scale[0], kSize, &values[0]);
    kernels(capability).encode_exp_avg_sq(&values[0], kSize, &again[0], &scale_again[0]);
    for (int64_t i = 0; i < kSize; ++i) {
      const double value = code_value(static_cast<int>(i)) / code_value(255) * 3;
      CHECK(std::abs(values[i] - value) <= 1e-6 * value, "value of %ld", static_cast<long>(i));
    }
    CHECK(again == codes, "unsigned codes");
  }
}

void check_encode_is_nearest(int64_t size) {
  std::mt19937 random(size);
  std::normal_distribution<float> normal;
  Array<float> values(size), decoded(size);
  const int64_t blocks = (size + kAdamWBlock - 1) / kAdamWBlock;
  for (bool square : {false, true}) {
    for (int64_t i = 0; i < size; ++i) {
      values[i] = normal(random) * std::pow(10.0f, -static_cast<float>(i % 12));
      if (square) values[i] *= values[i];
      if (i % 50 == 7) values[i] = 0;
    }
    Array<uint8_t> first(size);
    for (Capability capability : available_capabilities()) {
      const AdamWKernels& k = kernels(capability);
      Array<uint8_t> codes(size);
      Array<float> scales(blocks);
      (square ? k.encode_exp_avg_sq : k.encode_exp_avg)(&values[0], size, &codes[0], &scales[0]);
      (square ? k.decode_exp_avg_sq : k.decode_exp_avg)(&codes[0], &scales[0], size, &decoded[0]);
      if (capability == Capability::scalar) {
        std::copy_n(&codes[0], size, &first[0]);
      }
      CHECK(codes == first, "%s", name(capability));
      for (int64_t i = 0; i < size; ++i) {
        const double scale = scales[i / kAdamWBlock], value = values[i];
        const double step = code_step(std::abs(value) / scale, square ? 255 : 127) * scale;
        // The least code stands in for what is not zero.
        CHECK(std::abs(decoded[i] - value) <= (square ? 1.0001 : 0.5001) * step, "%g: %g", value,
              decoded[i]);
        CHECK((decoded[i] == 0) == (value == 0) || !square, "zero is kept, and nothing else is");
      }
    }
  }
}

}  // namespace

int main() {
  for (int64_t size : {1, 17, 255, 256, 257, 1000}) {
    check_step(size);
    check_encode_is_nearest(size);
  }
  check_unbiased();
  check_zeros_stay();
  check_wide_range_trains();
  check_nonfinite_spreads_in_its_block();
  check_extreme_magnitudes();
  check_codes();
}
