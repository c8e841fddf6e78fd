// Every mode of the AdamW step: near an exact step, and the same bits on every instruction set,
// however a parameter is cut.
#include "adamw_run.h"

using namespace torchweld::kernels;

namespace {

constexpr int64_t kSizes[] = {0, 1, 3, 8, 15, 16, 17, 31, 33, 100, 255, 256, 257, 300, 1000};

const char* text(const AdamWMode& mode) {
  static char buffer[80];
  std::snprintf(buffer, sizeof buffer, "dtype %d, state %d, rounding %d, amsgrad %d",
                static_cast<int>(mode.dtype), static_cast<int>(mode.state),
                static_cast<int>(mode.rounding), mode.amsgrad);
  return buffer;
}

// The distance of 16-bit or 32-bit floats around a value.
double unit_of(double value, DType dtype) {
  const int bits = dtype == DType::float64    ? 53
                   : dtype == DType::float32  ? 24
                   : dtype == DType::bfloat16 ? 8
                                              : 11;
  const int least = dtype == DType::float16 ? -24 : -149;
  return std::ldexp(1, value == 0 ? least : std::max(std::ilogb(value) + 1 - bits, least));
}

void check_near(double got, double exact, double bound, const char* what, const AdamWMode& mode) {
  CHECK(std::abs(got - exact) <= bound, "%s: %g, exactly %g, bound %g; %s", what, got, exact, bound,
        text(mode));
}

void check_against_double(int64_t size, const AdamWMode& mode) {
  AdamWRun run(size, mode);
  run.fill(1);
  const AdamWRun before(run);
  AdamWScalars scalars = AdamWRun::scalars_of(3);
  scalars.grad_scale = -0.5;
  run.step(scalars);
  CHECK(run.g == before.g, "the gradient is only read");
  const bool int8 = mode.state == AdamWState::int8;
  const bool nearest_state =
      mode.state == AdamWState::like_param && mode.rounding == AdamWRounding::nearest;
  for (int64_t i = 0; i < size; ++i) {
    const ExactStep exact(before, i, scalars);
    const double slack = 4 * unit_of(exact.p, DType::float32) + 1e-5 * std::abs(exact.update);
    double half_units = mode.rounding == AdamWRounding::stochastic ? 2 : 1;
    if (mode.dtype == DType::float64) half_units = 40;  // bounded by the test's own rounding
    double weight_bound = half_units * unit_of(exact.p, mode.dtype) / 2;
    if (mode.rounding == AdamWRounding::kahan) weight_bound *= std::ldexp(1, -7);
    if (mode.rounding == AdamWRounding::split) weight_bound = 0;
    check_near(run.weight(i), exact.p, weight_bound + slack, "weight", mode);
    if (int8) continue;  // test_adamw_int8
    const DType dtype = run.state_dtype();
    // In torch's bits the fma of a moment may cancel; the unit of its inputs bounds the rounding.
    const double m_unit = unit_of(std::max(std::abs(exact.m), std::abs(before.exp_avg(i))), dtype);
    const double steps = nearest_state ? 0.501 : 1.001;
    const double wide = dtype == DType::float32 || dtype == DType::float64 ? 4 : steps;
    check_near(run.exp_avg(i), exact.m, wide * m_unit, "exp_avg", mode);
    check_near(run.exp_avg_sq(i), exact.v, wide * unit_of(exact.v, dtype), "exp_avg_sq", mode);
    if (mode.amsgrad) {
      const double bound = std::max(wide, 0.501) * unit_of(exact.v_max, dtype);
      check_near(run.max_exp_avg_sq(i), exact.v_max, bound, "max_exp_avg_sq", mode);
    }
  }
}

void check_instruction_sets(int64_t size, const AdamWMode& mode) {
  AdamWRun start(size, mode);
  start.fill(2);
  AdamWRun expected(start);
  expected.step(AdamWRun::scalars_of(3), Capability::scalar, 1000);
  CHECK(size < 16 || !(expected.p == start.p), "the step changes the parameter; %s", text(mode));
  for (Capability capability : available_capabilities()) {
    AdamWRun run(start);
    run.step(AdamWRun::scalars_of(3), capability, 1000);
    CHECK(run == expected, "%s: size %ld, %s", name(capability), static_cast<long>(size),
          text(mode));
  }
}

void check_cuts(const AdamWMode& mode) {
  const int64_t unit = mode.state == AdamWState::int8 ? kAdamWBlock : kAdamWSpanUnit;
  const int64_t size = 5 * unit + 7;
  AdamWRun start(size, mode);
  start.fill(3);
  for (Capability capability : available_capabilities()) {
    AdamWRun whole(start), cut(start);
    whole.step(AdamWRun::scalars_of(3), capability);
    for (auto [begin, end] : {std::pair{3 * unit, size}, {unit, 3 * unit}, {int64_t{0}, unit}}) {
      cut.step_part(AdamWRun::scalars_of(3), capability, begin, end - begin);
    }
    CHECK(cut == whole, "%s: %s", name(capability), text(mode));
  }
}

// A shard may begin anywhere; where nothing is shared by blocks, its bits are those of the whole.
void check_shards(const AdamWMode& mode) {
  if (mode.state == AdamWState::int8) return;
  if (mode.state == AdamWState::like_param && mode.rounding == AdamWRounding::nearest) return;
  const int64_t size = 101, offset = 37;
  AdamWRun whole(size, mode);
  whole.fill(4);
  AdamWRun shard(size - offset, mode);
  const auto copy = [&](const Array<char>& from, const Array<char>& to, int64_t width) {
    if (to.size > 0) std::memcpy(&to[0], &from[0] + offset * width, to.size);
  };
  copy(whole.p, shard.p, whole.width);
  copy(whole.g, shard.g, whole.width);
  copy(whole.m, shard.m, whole.state_width);
  copy(whole.v, shard.v, whole.state_width);
  copy(whole.x, shard.x, whole.state_width);
  for (int64_t i = 0; i < shard.c.size; ++i) shard.c[i] = whole.c[offset + i];
  // Where a parameter's count of elements passes 2^32, too.
  for (int64_t index : {int64_t{0}, (int64_t{1} << 32) - 50}) {
    whole.step(AdamWRun::scalars_of(3), detect_capability(), index);
    shard.step(AdamWRun::scalars_of(3), detect_capability(), index + offset);
    for (int64_t i = 0; i < shard.size; ++i) {
      CHECK(shard.weight(i) == whole.weight(offset + i) &&
                shard.exp_avg(i) == whole.exp_avg(offset + i) &&
                shard.exp_avg_sq(i) == whole.exp_avg_sq(offset + i),
            "element %ld; %s", static_cast<long>(i), text(mode));
    }
  }
}

void check_sum_of_squares(int64_t size, DType dtype) {
  const Buffer x(size, dtype, 7);
  const auto sum = [&](Capability capability) {
    return table(capability).adamw->sum_of_squares[static_cast<size_t>(dtype)](x.data.get(), size);
  };
  CHECK(size == 0 ? sum(Capability::scalar) == 0 : sum(Capability::scalar) > 0, "sum");
  for (Capability capability : available_capabilities()) {
    CHECK(sum(capability) == sum(Capability::scalar), "%s: size %ld", name(capability),
          static_cast<long>(size));
  }
  if (dtype == DType::float32) {
    double expected = 0;
    for (int64_t i = 0; i < size; ++i) expected += std::pow(double{x.as<float>()[i]}, 2);
    CHECK(std::abs(sum(detect_capability()) - expected) <= 1e-13 * expected, "sum");
  }
}

}  // namespace

int main() {
  for (const AdamWMode& mode : adamw_modes()) {
    check_against_double(333, mode);
    for (int64_t size : kSizes) check_instruction_sets(size, mode);
    check_cuts(mode);
    check_shards(mode);
  }
  for (int64_t size : kSizes) {
    for (size_t i = 0; i < kDTypeCount; ++i) check_sum_of_squares(size, static_cast<DType>(i));
  }
}
