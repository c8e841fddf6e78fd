#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "check.h"

using namespace torchweld::kernels;

namespace {

constexpr int64_t kSizes[] = {0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 100, 257};

// A buffer of exactly `size` elements, at an address of no particular alignment.
struct Buffer {
  Buffer(int64_t size, unsigned seed, DType dtype)
      : bytes(size * size_of(dtype)), data(new char[bytes]) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> uniform(0.01, 1.0);
    for (int64_t i = 0; i < size; ++i) {
      const double value = uniform(random);
      const float narrow = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &narrow, 4);
      // Bit patterns of positive numbers below 1 in each 16-bit format.
      const uint16_t half = dtype == DType::bfloat16 ? bits >> 16 : 0x2000 + (bits >> 13) % 0x1000;
      char* to = data.get() + i * size_of(dtype);
      if (dtype == DType::float64) {
        std::memcpy(to, &value, 8);
      } else if (dtype == DType::float32) {
        std::memcpy(to, &narrow, 4);
      } else {
        std::memcpy(to, &half, 2);
      }
    }
  }
  bool operator==(const Buffer& other) const {
    return bytes == other.bytes && std::memcmp(data.get(), other.data.get(), bytes) == 0;
  }
  size_t bytes;
  std::unique_ptr<char[]> data;
};

struct State {
  State(int64_t size, DType dtype)
      : p(size, 1, dtype),
        g(size, 2, dtype),
        m(size, 3, dtype),
        v(size, 4, dtype),
        x(size, 5, dtype) {}
  Buffer p, g, m, v, x;
};

State stepped(Capability capability, int64_t size, DType dtype, bool amsgrad) {
  State s(size, dtype);
  const AdamWSpan span{s.p.data.get(),
                       s.g.data.get(),
                       s.m.data.get(),
                       s.v.data.get(),
                       amsgrad ? s.x.data.get() : nullptr,
                       size};
  const AdamWScalars scalars{.decay = 1 - 1e-5,
                             .beta1 = 0.9,
                             .beta2 = 0.999,
                             .step_size = 0.1 / (1 - std::pow(0.9, 3)),
                             .bias_root = std::sqrt(1 - std::pow(0.999, 3)),
                             .eps = 1e-8,
                             .grad_scale = -0.5};
  table(capability).adamw->step[static_cast<size_t>(dtype)](span, scalars);
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
  const Buffer x(size, 7, dtype);
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
