// The look at a step: sums against the test's own, average and copy, for every mode.
#include "adamw_run.h"

using namespace torchweld::kernels;

namespace {

struct Look {
  explicit Look(int64_t size, DType dtype)
      : ema(size * (dtype == DType::float64 ? 8 : 4)), copy(size) {}
  double average(int64_t i, DType dtype) const {
    return dtype == DType::float64 ? AdamWRun::get(ema, 8, i, dtype)
                                   : AdamWRun::get(ema, 4, i, DType::float32);
  }
  Array<char> ema;
  Array<uint16_t> copy;
  AdamWStatistics statistics{};
};

Look observed(const AdamWRun& before, const AdamWRun& after, const AdamWScalars& scalars,
              Capability capability) {
  const DType dtype = before.mode.dtype;
  Look look(before.size, dtype);
  const AdamWObserver observer{
      .param_before = before.p.data.get(),
      .compensation_before = before.c.size > 0 ? before.c.data.get() : nullptr,
      .ema = look.ema.data.get(),
      .ema_weight = 0.25,
      .bfloat16 =
          dtype == DType::float64 ? nullptr : reinterpret_cast<BFloat16*>(look.copy.data.get())};
  const auto& kernels = *table(capability).adamw;
  kernels.observe(dtype, before.mode.state, before.mode.rounding)(after.span(), scalars, observer,
                                                                  &look.statistics);
  return look;
}

void check_observation(int64_t size, const AdamWMode& mode) {
  AdamWRun before(size, mode);
  before.fill(1);
  if (size > 20) {
    before.set_grad(20, INFINITY);
    before.set_grad(2, NAN);
    if (mode.dtype == DType::float16) {
      const uint16_t bits[] = {0x7c00, 0x7e00};
      std::memcpy(&before.g[0] + 40, &bits[0], 2);
      std::memcpy(&before.g[0] + 4, &bits[1], 2);
    }
  }
  AdamWRun after(before);
  const AdamWScalars scalars = AdamWRun::scalars_of(3, 1e-5);
  after.step(scalars);
  const Look expected = observed(before, after, scalars, Capability::scalar);
  int64_t lost = 0;
  for (int64_t i = 0; i < size; ++i) lost += after.weight(i) == before.weight(i);
  CHECK(expected.statistics.lost == lost, "%ld lost, %ld expected; rounding %d",
        static_cast<long>(expected.statistics.lost), static_cast<long>(lost),
        static_cast<int>(mode.rounding));
  CHECK(expected.statistics.nonfinite == (size > 20 ? 2 : 0), "nonfinite gradients");
  if (size <= 20) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += std::pow(after.weight(i) - before.weight(i), 2);
    CHECK(std::abs(expected.statistics.update_squares - squares) <= 1e-13 * squares,
          "%g, expected %g", expected.statistics.update_squares, squares);
  } else {
    CHECK(std::isnan(expected.statistics.update_squares), "a NaN update shows");
  }
  for (int64_t i = 0; i < size; ++i) {
    if (std::isnan(after.weight(i))) continue;
    const double average = expected.average(i, mode.dtype);
    CHECK(std::abs(average - 0.25 * after.weight(i)) <= 1e-7 * std::abs(average), "average");
    if (mode.dtype == DType::float64) continue;
    CHECK(expected.copy[i] == to_bfloat16(static_cast<float>(after.weight(i))), "copy");
  }
  for (Capability capability : available_capabilities()) {
    const Look look = observed(before, after, scalars, capability);
    CHECK(std::memcmp(&look.statistics, &expected.statistics, sizeof look.statistics) == 0 ||
              size > 20,
          "%s", name(capability));
    CHECK(look.statistics.lost == lost, "%s", name(capability));
    CHECK(look.ema == expected.ema || size > 20, "%s", name(capability));
    CHECK(look.copy == expected.copy, "%s", name(capability));
  }
}

void check_what_counts_as_lost() {
  constexpr int64_t kSize = 40;
  AdamWRun before(kSize, {DType::bfloat16});
  AdamWScalars scalars = AdamWRun::scalars_of(1, 1e-6);
  scalars.decay = 1;
  for (int64_t i = 0; i < kSize; ++i) before.set_weight(i, 1);
  for (int64_t i = 0; i < 10; ++i) before.set_grad(i, 1);
  AdamWRun after(before);
  after.step(scalars);
  const auto lost = [&](const AdamWScalars& s) {
    return observed(before, after, s, detect_capability()).statistics.lost;
  };
  CHECK(lost(scalars) == 10, "zero gradients lose nothing");
  scalars.decay = 1 - 1e-9;
  CHECK(lost(scalars) == kSize, "the decay is lost on all");
  scalars.decay = 1;
  scalars.step_size = 0;
  CHECK(lost(scalars) == 0, "no learning rate, no update");
}

}  // namespace

int main() {
  for (const AdamWMode& mode : adamw_modes()) {
    for (int64_t size : {0, 1, 17, 20, 300}) check_observation(size, mode);
  }
  check_what_counts_as_lost();
}
