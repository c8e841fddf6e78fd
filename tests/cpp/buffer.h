// A buffer of exactly as many elements as a kernel may touch.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

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

// Room for as much as a buffer holds, `shift` bytes behind a border of 64: where stores may go past
// the caches, and where they may not.
struct Aligned {
  Aligned(const Buffer& like, int64_t shift) : storage(like.bytes + 128, 0x7e) {
    data = storage.data() + (-reinterpret_cast<uintptr_t>(storage.data()) & 63) + shift;
  }
  bool operator==(const Buffer& other) const {
    return std::memcmp(data, other.data.get(), other.bytes) == 0;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

  std::vector<char> storage;
  char* data;
};

inline float widen(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To nearest even; not for NaN.
inline uint16_t round_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16) % 2) >> 16);
}

// A buffer of bfloat16 as float32, and back.
inline Buffer widened(const Buffer& from) {
  Buffer to(static_cast<int64_t>(from.bytes / 2), DType::float32);
  for (size_t i = 0; i < from.bytes / 2; ++i) to.as<float>()[i] = widen(from.as<uint16_t>()[i]);
  return to;
}
inline Buffer rounded(const Buffer& from) {
  Buffer to(static_cast<int64_t>(from.bytes / 4), DType::bfloat16);
  for (size_t i = 0; i < from.bytes / 4; ++i) {
    to.as<uint16_t>()[i] = round_to_bfloat16(from.as<float>()[i]);
  }
  return to;
}

}  // namespace torchweld::kernels
