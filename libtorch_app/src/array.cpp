#include "array.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <numeric>
#include <utility>

namespace weld {
namespace {

constexpr size_t kAlignment = 64;

struct Info {
  const char* name;
  size_t size;
};
// In the order of DType.
constexpr Info kInfo[] = {{"bool", 1},    {"uint8", 1},  {"int8", 1},    {"int16", 2},
                          {"int32", 4},   {"int64", 8},  {"float16", 2}, {"bfloat16", 2},
                          {"float32", 4}, {"float64", 8}};

const Info& info(DType dtype) { return kInfo[static_cast<size_t>(dtype)]; }

template <class T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int fraction = bits & 0x3ff;
  double value;
  if (exponent == 0x1f) {
    value = fraction ? std::nan("") : HUGE_VAL;
  } else if (exponent == 0) {
    value = std::ldexp(fraction, -24);
  } else {
    value = std::ldexp(fraction + 0x400, exponent - 25);
  }
  return bits & 0x8000 ? -value : value;
}

}  // namespace

const char* name(DType dtype) { return info(dtype).name; }

size_t size_of(DType dtype) { return info(dtype).size; }

std::optional<DType> dtype_from_name(std::string_view name) {
  for (size_t i = 0; i < std::size(kInfo); ++i) {
    if (name == kInfo[i].name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

Array::Array(DType dtype, Shape shape)
    : dtype(dtype), shape(std::move(shape)), data(nullptr, &std::free) {
  const size_t size = (bytes() / kAlignment + 1) * kAlignment;
  data.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, size)));
  if (data == nullptr) throw std::bad_alloc();
}

int64_t Array::numel() const {
  // The other dimensions of an empty array may overflow.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

Array rows(const Array& array, int64_t begin, int64_t end) {
  Shape shape = array.shape;
  shape[0] = end - begin;
  Array part(array.dtype, std::move(shape));
  if (part.bytes() > 0) {
    const size_t row = array.bytes() / static_cast<size_t>(array.shape[0]);
    std::memcpy(part.data.get(), array.data.get() + static_cast<size_t>(begin) * row, part.bytes());
  }
  return part;
}

Array concatenate(const std::vector<Array>& parts) {
  Shape shape = parts[0].shape;
  shape[0] = 0;
  for (const Array& part : parts) shape[0] += part.shape[0];
  Array whole(parts[0].dtype, std::move(shape));
  std::byte* to = whole.data.get();
  for (const Array& part : parts) {
    std::memcpy(to, part.data.get(), part.bytes());
    to += part.bytes();
  }
  return whole;
}

double element(const Array& array, int64_t index) {
  const std::byte* at = array.data.get() + static_cast<size_t>(index) * size_of(array.dtype);
  switch (array.dtype) {
    case DType::bool_:
    case DType::uint8:
      return load<uint8_t>(at);
    case DType::int8:
      return load<int8_t>(at);
    case DType::int16:
      return load<int16_t>(at);
    case DType::int32:
      return load<int32_t>(at);
    case DType::int64:
      return static_cast<double>(load<int64_t>(at));
    case DType::float16:
      return half_to_double(load<uint16_t>(at));
    case DType::bfloat16:
      return std::bit_cast<float>(static_cast<uint32_t>(load<uint16_t>(at)) << 16);
    case DType::float32:
      return load<float>(at);
    case DType::float64:
      return load<double>(at);
  }
  return 0;
}

}  // namespace weld
