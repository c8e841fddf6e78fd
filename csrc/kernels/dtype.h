// Storage types of tensors, as the kernels see them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchweld::kernels {

enum class DType { float32, float64, bfloat16, float16 };
inline constexpr std::size_t kDTypeCount = 4;

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

}  // namespace torchweld::kernels
