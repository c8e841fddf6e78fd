// A dense array in C order: what weld reads, runs and writes. No torch in sight.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace weld {

enum class DType { bool_, uint8, int8, int16, int32, int64, float16, bfloat16, float32, float64 };

// torch's name, such as "float32".
const char* name(DType dtype);
std::optional<DType> dtype_from_name(std::string_view name);
size_t size_of(DType dtype);

using Shape = std::vector<int64_t>;

// "[2, 3]"
std::string to_string(const Shape& shape);

struct Array {
  // Allocates without initializing. 64 bytes is torch's own alignment: vendor kernels may round
  // differently on less.
  Array(DType dtype, Shape shape);

  int64_t numel() const;
  size_t bytes() const { return static_cast<size_t>(numel()) * size_of(dtype); }

  DType dtype;
  Shape shape;
  std::unique_ptr<std::byte[], decltype(&std::free)> data;
};

// A copy of rows [begin, end) of the first dimension.
Array rows(const Array& array, int64_t begin, int64_t end);

// Arrays joined along the first dimension; all agree in dtype and in the other dimensions.
Array concatenate(const std::vector<Array>& parts);

// One element as a double. int64 beyond 2^53 is rounded: for display only.
double element(const Array& array, int64_t index);

}  // namespace weld
