// What each rounding of bfloat16 parameters and states is for.
#include "adamw_run.h"

using namespace torchweld::kernels;

namespace {

constexpr AdamWMode kSR{DType::bfloat16, AdamWState::bfloat16, AdamWRounding::stochastic};

void check_stochastic_is_unbiased() {
  constexpr int64_t kSize = 37;
  constexpr int kKeys = 4000;
  AdamWRun start(kSize, kSR);
  start.fill(1);
  double p_sum[kSize] = {}, m_sum[kSize] = {}, v_sum[kSize] = {};
  const auto low_bits_off = [](double x) { return of_bfloat16(bits_of_float(x) >> 16); };
  for (int key = 0; key < kKeys; ++key) {
    AdamWRun run(start);
    const AdamWScalars scalars = AdamWRun::scalars_of(3, 1e-3, static_cast<uint64_t>(key));
    run.step(scalars);
    for (int64_t i = 0; i < kSize; ++i) {
      const ExactStep exact(start, i, scalars);
      for (auto [got, value] : {std::pair{run.weight(i), exact.p},
                                {run.exp_avg(i), exact.m},
                                {run.exp_avg_sq(i), exact.v}}) {
        // One of the two neighbours; the step itself is in float.
        const double toward_zero = low_bits_off(value * (1 + 1e-6));
        const double unit = std::ldexp(1, std::ilogb(value) - 7);
        const double up = std::abs(got) - std::abs(low_bits_off(value * (1 - 1e-6)));
        CHECK(
            std::abs(got - toward_zero) <= unit * 1.001 && up > -unit * 1e-3 && up <= unit * 2.001,
            "%g is no neighbour of %g", got, value);
      }
      p_sum[i] += run.weight(i);
      m_sum[i] += run.exp_avg(i);
      v_sum[i] += run.exp_avg_sq(i);
    }
  }
  for (int64_t i = 0; i < kSize; ++i) {
    const ExactStep exact(start, i, AdamWRun::scalars_of(3));
    for (auto [sum, value] :
         {std::pair{p_sum[i], exact.p}, {m_sum[i], exact.m}, {v_sum[i], exact.v}}) {
      const double unit = std::ldexp(1, std::ilogb(value) - 7);
      // Five standard deviations, of at most half a unit for one draw.
      const double bound = 5 * 0.5 * unit / std::sqrt(kKeys) + 1e-6 * std::abs(value);
      CHECK(std::abs(sum / kKeys - value) <= bound, "mean %.9g, exactly %.9g", sum / kKeys, value);
    }
  }
}

// Two keys, and two elements, draw independently: half of the pairs of top bits agree.
void check_draws_are_independent() {
  constexpr int64_t kSize = 4096;
  const auto rounded_up = [](uint64_t seed, uint64_t step, uint64_t parameter) {
    AdamWRun run(kSize, kSR);
    for (int64_t i = 0; i < kSize; ++i) {
      run.set_weight(i, 1);
      run.set_grad(i, 1);
    }
    AdamWScalars scalars = AdamWRun::scalars_of(1);
    scalars.decay = 1 + std::ldexp(1, -8);  // halfway between 1 and its neighbour
    scalars.step_size = 0;
    scalars.key = adamw_key(seed, step, parameter);
    run.step(scalars);
    std::vector<bool> up;
    for (int64_t i = 0; i < kSize; ++i) up.push_back(run.weight(i) > 1);
    return up;
  };
  const auto check_half = [](int64_t agreeing, const char* what) {
    CHECK(std::abs(agreeing - kSize / 2) < 5 * 32, "%s: %ld of %ld", what,
          static_cast<long>(agreeing), static_cast<long>(kSize));
  };
  const std::vector<bool> first = rounded_up(0, 1, 0);
  check_half(std::count(first.begin(), first.end(), true), "up");
  const uint64_t others[][3] = {{1, 1, 0}, {0, 2, 0}, {0, 1, 1}};
  for (const auto& [seed, step, parameter] : others) {
    const std::vector<bool> other = rounded_up(seed, step, parameter);
    for (int64_t shift : {0, 1, 2, 16, 64}) {
      int64_t agreeing = 0;
      for (int64_t i = 0; i < kSize; ++i) agreeing += first[i] == other[(i + shift) % kSize];
      check_half(agreeing, "another key");
    }
  }
  for (int64_t shift : {1, 2, 8, 16, 32, 1024}) {
    int64_t agreeing = 0;
    for (int64_t i = 0; i < kSize; ++i) agreeing += first[i] == first[(i + shift) % kSize];
    check_half(agreeing, "another element");
  }
}

void check_second_moment_decays() {
  constexpr int64_t kSize = 256;
  const auto after = [](AdamWMode mode) {
    AdamWRun run(kSize, mode);
    for (int64_t i = 0; i < kSize; ++i) {
      const uint16_t one = to_bfloat16(1);
      std::memcpy(&run.v[0] + 2 * i, &one, 2);
    }
    for (int k = 1; k <= 1000; ++k) run.step(AdamWRun::scalars_of(k));
    double mean = 0;
    for (int64_t i = 0; i < kSize; ++i) mean += run.exp_avg_sq(i) / kSize;
    return mean;
  };
  const double exact = std::pow(0.999, 1000);
  CHECK(after({DType::bfloat16}) == 1, "torch's rounding cannot decay: the test's premise");
  for (AdamWRounding rounding : {AdamWRounding::nearest, AdamWRounding::stochastic,
                                 AdamWRounding::kahan, AdamWRounding::split}) {
    const double mean = after({DType::bfloat16, AdamWState::bfloat16, rounding});
    CHECK(std::abs(mean - exact) < 0.05 * exact, "decays to %g, exactly %g", mean, exact);
  }
}

// A bfloat16 parameter and its lower half walk with a float32 master, bit for bit.
void check_split_is_a_master(AdamWState state) {
  constexpr int64_t kSize = 700;
  AdamWRun split(kSize, {DType::bfloat16, state, AdamWRounding::split});
  AdamWRun master(kSize, {DType::float32, state, AdamWRounding::nearest});
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < kSize; ++i) {
    split.set_weight(i, normal(random));
    master.set_weight(i, split.weight(i));
  }
  for (int k = 1; k <= 30; ++k) {
    for (int64_t i = 0; i < kSize; ++i) {
      split.set_grad(i, normal(random));
      master.set_grad(i, split.grad(i));
    }
    const AdamWScalars scalars = AdamWRun::scalars_of(k);
    split.step(scalars);
    master.step(scalars);
    CHECK(split.m == master.m && split.v == master.v, "states, step %d", k);
    for (int64_t i = 0; i < kSize; ++i) {
      CHECK(split.weight(i) == master.weight(i), "step %d, element %ld: %.9g, master %.9g", k,
            static_cast<long>(i), split.weight(i), master.weight(i));
      const double upper = AdamWRun::get(split.p, 2, i, DType::bfloat16);
      CHECK(std::abs(upper - split.weight(i)) <= std::ldexp(1, std::ilogb(split.weight(i)) - 8),
            "the parameter is the master, rounded to nearest");
    }
  }
}

// Steps far below half a unit of the parameter.
void check_small_updates_add_up() {
  constexpr int64_t kSize = 256;
  constexpr int kSteps = 500;
  constexpr double kUpdate = 1e-5;
  const auto error = [](AdamWState state, AdamWRounding rounding) {
    AdamWRun run(kSize, {DType::bfloat16, state, rounding});
    for (int64_t i = 0; i < kSize; ++i) {
      run.set_weight(i, 1);
      run.set_grad(i, 1);  // always the same gradient: every update is -lr
    }
    double mean = 0;
    for (int k = 1; k <= kSteps; ++k) {
      AdamWScalars scalars = AdamWRun::scalars_of(k, kUpdate);
      scalars.decay = 1;
      run.step(scalars);
    }
    for (int64_t i = 0; i < kSize; ++i) mean += run.weight(i) / kSize;
    return std::abs(mean - (1 - kSteps * kUpdate)) / (kSteps * kUpdate);
  };
  CHECK(error(AdamWState::like_param, AdamWRounding::nearest) > 0.99, "nearest loses all of them");
  for (AdamWState state : {AdamWState::bfloat16, AdamWState::int8}) {
    CHECK(error(state, AdamWRounding::nearest) > 0.99, "nearest loses all of them");
    CHECK(error(state, AdamWRounding::stochastic) < 0.1, "stochastic: %g",
          error(state, AdamWRounding::stochastic));
    CHECK(error(state, AdamWRounding::kahan) < 0.02, "kahan: %g",
          error(state, AdamWRounding::kahan));
    CHECK(error(state, AdamWRounding::split) < 0.02, "split: %g",
          error(state, AdamWRounding::split));
  }
}

void check_nonfinite_gradients_stay_alone() {
  for (const AdamWMode& mode : adamw_modes()) {
    if (mode.state == AdamWState::int8) continue;  // test_adamw_int8
    for (Capability capability : available_capabilities()) {
      AdamWRun run(100, mode);
      run.fill(6);
      AdamWRun expected(run);
      // The quiet NaN with a full payload is what carries into a sign most easily.
      for (int64_t i : {3, 40}) {
        std::memset(&run.g[0] + i * run.width, 0xff, run.width);
        run.g[(i + 1) * run.width - 1] = i == 3 ? 0x7f : static_cast<char>(0xff);
      }
      run.set_grad(99, INFINITY);
      if (mode.dtype == DType::float16) {
        const uint16_t infinity = 0x7c00;
        std::memcpy(&run.g[0] + 99 * 2, &infinity, 2);
      }
      run.step(AdamWRun::scalars_of(3), capability);
      expected.step(AdamWRun::scalars_of(3), capability);
      for (int64_t i = 0; i < 100; ++i) {
        if (i == 3 || i == 40) {
          CHECK(std::isnan(run.weight(i)) && std::isnan(run.exp_avg(i)) &&
                    std::isnan(run.exp_avg_sq(i)),
                "NaN stays NaN: dtype %d state %d rounding %d: %g %g %g",
                static_cast<int>(mode.dtype), static_cast<int>(mode.state),
                static_cast<int>(mode.rounding), run.weight(i), run.exp_avg(i), run.exp_avg_sq(i));
        } else if (i == 99) {
          CHECK(std::isnan(run.weight(i)) && std::isinf(run.exp_avg(i)), "as in torch");
        } else {
          CHECK(run.weight(i) == expected.weight(i), "others go on");
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_stochastic_is_unbiased();
  check_draws_are_independent();
  check_second_moment_decays();
  check_split_is_a_master(AdamWState::bfloat16);
  check_split_is_a_master(AdamWState::int8);
  check_small_updates_add_up();
  check_nonfinite_gradients_stay_alone();
}
