#include <cmath>

#include "buffer.h"
#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr int64_t kSizes[] = {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257};

struct State {
  State(int64_t size, DType dtype)
      : p(size, dtype, 1),
        g(size, dtype, 2),
        m(size, dtype, 3),
        v(size, dtype, 4),
        x(size, dtype, 5) {}
  Buffer p, g, m, v, x;
};

State stepped(Capability capability, int64_t size, DType dtype, bool amsgrad) {
  State s(size, dtype);
  const AdamWSpan span{.param = s.p.data.get(),
                       .grad = s.g.data.get(),
                       .exp_avg = s.m.data.get(),
                       .exp_avg_sq = s.v.data.get(),
                       .max_exp_avg_sq = amsgrad ? s.x.data.get() : nullptr,
                       .compensation = nullptr,
                       .exp_avg_scale = nullptr,
                       .exp_avg_sq_scale = nullptr,
                       .size = size,
                       .index = 0};
  const AdamWScalars scalars{.decay = 1 - 1e-5,
                             .beta1 = 0.9,
                             .beta2 = 0.999,
                             .step_size = 0.1 / (1 - std::pow(0.9, 3)),
                             .bias_root = std::sqrt(1 - std::pow(0.999, 3)),
                             .eps = 1e-8,
                             .grad_scale = -0.5};
  table(capability).adamw->step(dtype)(span, scalars);
  return s;
}

void check_step(int64_t size, DType dtype, bool amsgrad) {
  const State before(size, dtype);
  const State expected = stepped(Capability::scalar, size, dtype, amsgrad);
  // A few 16-bit values may all round back to where they were.
  CHECK(size < 16 || !(expected.p == before.p),
        "the step changes the parameter: size %ld, dtype %d", static_cast<long>(size),
        static_cast<int>(dtype));
  CHECK(expected.g == before.g, "the gradient is only read");
  for (Capability capability : available_capabilities()) {
    const State s = stepped(capability, size, dtype, amsgrad);
    CHECK(s.p == expected.p && s.m == expected.m && s.v == expected.v && s.x == expected.x,
          "%s: size %ld, dtype %d, amsgrad %d", name(capability), static_cast<long>(size),
          static_cast<int>(dtype), amsgrad);
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
}

}  // namespace

int main() {
  for (int64_t size : kSizes) {
    for (size_t i = 0; i < kDTypeCount; ++i) {
      const DType dtype = static_cast<DType>(i);
      check_step(size, dtype, false);
      check_step(size, dtype, true);
      check_sum_of_squares(size, dtype);
    }
  }
}
