// Argument checks. Every message names the operator, the argument, what was expected and what came.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/torch_compat.h"

namespace torchweld::ops {

// "[2, 3, 4]"
inline std::string shape_string(const Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

// "float32", as Python prints it without "torch."
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

// "float32 [2, 3, 4]"
inline std::string describe(const Tensor& tensor) {
  return std::string(dtype_name(tensor.scalar_type())) + " " + shape_string(tensor);
}

inline bool has_shape(const Tensor& tensor, const IntList& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), others = b.sizes();
  return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end());
}

}  // namespace torchweld::ops

// TORCHWELD_CHECK(weight.dim() == 4, "conv_bn_relu", "weight", "4 dimensions",
// shape_string(weight)); throws "torchweld::conv_bn_relu: weight: expected 4 dimensions, got [16,
// 9]". `expected` and `got` may be chains: "K = " << k.
#define TORCHWELD_CHECK(condition, op, argument, expected, got)                                 \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      std::ostringstream torchweld_message;                                                     \
      torchweld_message << "torchweld::" << op << ": " << argument << ": expected " << expected \
                        << ", got " << got;                                                     \
      throw std::runtime_error(torchweld_message.str());                                        \
    }                                                                                           \
  } while (false)
