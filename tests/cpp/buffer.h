// A buffer of exactly as many elements as a kernel may touch.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/dtype.h"

namespace torchweld::kernels {

struct Buffer {
  Buffer(int64_t size, DType dtype)
      : bytes(size * size_of(dtype)), data(new char[bytes]), dtype(dtype) {
    std::memset(data.get(), 0x7e, bytes);
  }

  // Random values of magnitude 0.01 to 1; with signs, about half of them negative.
  Buffer(int64_t size, DType dtype, unsigned seed, bool signs = false) : Buffer(size, dtype) {
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
      // The sign is the last byte's top bit in every format.
      if (signs && random() % 2) to[size_of(dtype) - 1] |= static_cast<char>(0x80);
    }
  }

  bool operator==(const Buffer& other) const {
    return bytes == other.bytes && std::memcmp(data.get(), other.data.get(), bytes) == 0;
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }

  size_t bytes;
  std::unique_ptr<char[]> data;
  DType dtype;
};

}  // namespace torchweld::kernels
