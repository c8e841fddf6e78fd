// What kernels/cuda/mma.h says of the tensor cores, on the emulator.
#pragma once

#include <cmath>

#include "kernels/cuda/lane.h"

namespace torchweld::kernels::cuda {

inline int32_t cut_off(int64_t x) { return static_cast<int32_t>(x); }
// The tensor cores' rounding, to zero: a sum of many products is the worse for it.
inline float cut_off(double x) {
  const auto rounded = static_cast<float>(x);
  const bool is_beyond = std::isfinite(rounded) && std::abs(rounded) > std::abs(x);
  return is_beyond ? std::nextafter(rounded, 0.0f) : rounded;
}

// Element [row][k] of A, [k][column] of B and the rest is found as the table of mma.h has it: a
// lane holds words of kPack adjacent k, the halves of K in registers of their own.
template <int kPack, class Sum, class Multiply>
void emulated_mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const Multiply& multiply) {
  struct Fragments {
    const uint32_t *a, *b;
  };
  auto& block = *cuda_emulator::Block::current;
  const Fragments own{a, b};
  const auto all = block.exchange(0xffffffffu, reinterpret_cast<uintptr_t>(&own));
  const auto of = [&](unsigned lane) { return *reinterpret_cast<const Fragments*>(all[lane]); };
  const unsigned g = block.lane() / 4, t = block.lane() % 4;
  Sum result[4];
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = 2 * t + i % 2;
    decltype(multiply(0u, 0u)) sum = 0;
    for (unsigned half = 0; half < 2; ++half) {
      for (unsigned word = 0; word < 4; ++word) {
        const uint32_t left = of(4 * g + word).a[2 * half + i / 2];
        const uint32_t right = of(4 * column + word).b[half];
        for (unsigned k = 0; k < kPack; ++k) {
          const unsigned bits = 32 / kPack;
          const uint32_t mask = (1u << bits) - 1;
          sum += multiply(left >> (bits * k) & mask, right >> (bits * k) & mask);
        }
      }
    }
    result[i] = cut_off(d[i] + sum);
  }
  block.exchange(0xffffffffu, 0);  // all have read; d may be what a or b was
  for (unsigned i = 0; i < 4; ++i) d[i] = result[i];
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma<4>(d, a, b, [](uint32_t x, uint32_t y) -> int64_t {
    return static_cast<int8_t>(x) * static_cast<int8_t>(y);
  });
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated_mma<2>(d, a, b, [](uint32_t x, uint32_t y) {
    return static_cast<double>(float_of(x << 16)) * float_of(y << 16);
  });
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto value = [](uint32_t x) { return to_vec(Float16{static_cast<uint16_t>(x)}); };
  emulated_mma<2>(d, a, b,
                  [&](uint32_t x, uint32_t y) { return static_cast<double>(value(x)) * value(y); });
}

}  // namespace torchweld::kernels::cuda
