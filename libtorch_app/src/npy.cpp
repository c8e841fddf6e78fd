#include "npy.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cctype>
#include <charconv>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string_view>
#include <utility>

#include "error.h"

namespace weld {
namespace {

static_assert(std::endian::native == std::endian::little, "data is read and written as it lies");

constexpr char kMagic[] = {'\x93', 'N', 'U', 'M', 'P', 'Y'};

constexpr std::pair<DType, const char*> kDescr[] = {
    {DType::bool_, "|b1"},   {DType::uint8, "|u1"},   {DType::int8, "|i1"},
    {DType::int16, "<i2"},   {DType::int32, "<i4"},   {DType::int64, "<i8"},
    {DType::float16, "<f2"}, {DType::float32, "<f4"}, {DType::float64, "<f8"}};

// The header is the literal of a Python dict with exactly the keys descr, fortran_order and shape.
class HeaderParser {
 public:
  struct Header {
    std::string descr;
    bool fortran_order;
    Shape shape;
  };

  explicit HeaderParser(std::string_view text) : rest_(text) {}

  // Nothing if the text is no such literal.
  std::optional<Header> parse() {
    std::optional<std::string> descr;
    std::optional<bool> fortran_order;
    std::optional<Shape> shape;
    if (!take("{")) return std::nullopt;
    while (!take("}")) {
      const std::optional<std::string> key = string();
      if (!key || !take(":")) return std::nullopt;
      bool ok = false;
      if (*key == "descr" && !descr) {
        ok = (descr = string()).has_value();
      } else if (*key == "fortran_order" && !fortran_order) {
        ok = (fortran_order = boolean()).has_value();
      } else if (*key == "shape" && !shape) {
        ok = (shape = tuple()).has_value();
      }
      if (!ok || !(take(",") || peek('}'))) return std::nullopt;
    }
    skip_space();
    if (!rest_.empty() || !descr || !fortran_order || !shape) return std::nullopt;
    return Header{*descr, *fortran_order, *shape};
  }

 private:
  void skip_space() {
    while (!rest_.empty() && std::isspace(static_cast<unsigned char>(rest_[0]))) {
      rest_.remove_prefix(1);
    }
  }

  bool take(std::string_view token) {
    skip_space();
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }

  bool peek(char c) {
    skip_space();
    return rest_.starts_with(c);
  }

  std::optional<std::string> string() {
    skip_space();
    if (rest_.empty() || (rest_[0] != '\'' && rest_[0] != '"')) return std::nullopt;
    const size_t end = rest_.find(rest_[0], 1);
    if (end == std::string_view::npos) return std::nullopt;
    std::string text(rest_.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    return text;
  }

  std::optional<bool> boolean() {
    if (take("True")) return true;
    if (take("False")) return false;
    return std::nullopt;
  }

  std::optional<Shape> tuple() {
    Shape shape;
    if (!take("(")) return std::nullopt;
    bool comma = true;
    while (!take(")")) {
      skip_space();
      int64_t value;
      const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
      if (!comma || error != std::errc() || value < 0) return std::nullopt;
      rest_.remove_prefix(static_cast<size_t>(end - rest_.data()));
      shape.push_back(value);
      comma = take(",");
    }
    if (shape.size() == 1 && !comma) return std::nullopt;  // (3) is a number, (3,) a tuple
    return shape;
  }

  std::string_view rest_;
};

// Bytes the data takes, or nothing if they overflow.
std::optional<uint64_t> data_size(const Shape& shape, DType dtype) {
  int64_t size = static_cast<int64_t>(size_of(dtype));
  bool overflow = false;
  for (const int64_t n : shape) overflow |= __builtin_mul_overflow(size, n, &size);
  // An empty array has no bytes even where the product of its other dimensions overflows.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  if (overflow) return std::nullopt;
  return static_cast<uint64_t>(size);
}

DType dtype_from_descr(const std::string& descr, const std::string& file) {
  for (const auto& [dtype, text] : kDescr) {
    // Byte order means nothing for one byte, so any mark is right there.
    if (descr == text || (text[0] == '|' && descr.size() == 3 && descr.substr(1) == text + 1)) {
      return dtype;
    }
  }
  if (descr.starts_with('>')) {
    throw InputError(file + " holds big-endian numbers (" + descr +
                     "); save array.astype(array.dtype.newbyteorder('<'))");
  }
  throw InputError(
      file + " has dtype " + descr +
      "; expected bool, uint8, int8, int16, int32, int64, float16, float32 or float64");
}

}  // namespace

Array read_npy(const std::filesystem::path& path) {
  const std::string file = path.string();
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) throw InputError(file + " does not exist");
  if (!std::filesystem::is_regular_file(status)) throw InputError(file + " is not a regular file");
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw InputError(file + " cannot be opened");
  const uint64_t file_size = std::filesystem::file_size(path);
  const auto read = [&](void* to, uint64_t size) {
    return static_cast<bool>(
        stream.read(static_cast<char*>(to), static_cast<std::streamsize>(size)));
  };

  uint8_t start[8];
  if (!read(start, sizeof start) || std::memcmp(start, kMagic, sizeof kMagic) != 0) {
    throw InputError(file + " is not a .npy file");
  }
  const int version = start[6];
  if (version < 1 || version > 3 || start[7] != 0) {
    throw InputError(file + " has .npy version " + std::to_string(version) + "." +
                     std::to_string(start[7]) + "; expected 1.0, 2.0 or 3.0");
  }
  const uint64_t length_size = version == 1 ? 2 : 4;
  uint32_t header_size = 0;
  const uint64_t fixed = sizeof start + length_size;
  if (!read(&header_size, length_size) || header_size > file_size - fixed) {
    throw InputError(file + " is truncated: it ends in its header");
  }
  std::string text(header_size, '\0');
  if (!read(text.data(), header_size)) throw InputError(file + " cannot be read");
  const auto header = HeaderParser(text).parse();
  if (!header) throw InputError(file + " is corrupted: its header cannot be parsed");

  const DType dtype = dtype_from_descr(header->descr, file);
  if (header->fortran_order) {
    throw InputError(file + " is in Fortran order; save numpy.ascontiguousarray(array)");
  }
  // The sizes are compared before anything is allocated: the header may claim any number.
  const std::optional<uint64_t> size = data_size(header->shape, dtype);
  const uint64_t left = file_size - fixed - header_size;
  if (!size || *size != left) {
    throw InputError(file + (size && *size < left ? " is too long" : " is truncated") + ": shape " +
                     to_string(header->shape) + " of " + name(dtype) + " takes " +
                     (size ? std::to_string(*size) : "more than 2^63") + " bytes, the file holds " +
                     std::to_string(left));
  }
  Array array(dtype, header->shape);
  if (!read(array.data.get(), *size)) throw InputError(file + " cannot be read");
  if (dtype == DType::bool_) {
    const auto* values = reinterpret_cast<const uint8_t*>(array.data.get());
    if (std::any_of(values, values + *size, [](uint8_t value) { return value > 1; })) {
      throw InputError(file + " is corrupted: it holds booleans that are neither 0 nor 1");
    }
  }
  return array;
}

void write_npy(const std::filesystem::path& path, const Array& array) {
  const auto* found = std::find_if(std::begin(kDescr), std::end(kDescr),
                                   [&](const auto& entry) { return entry.first == array.dtype; });
  if (found == std::end(kDescr)) {
    throw InputError(std::string("the output is ") + name(array.dtype) +
                     ", which .npy files cannot hold");
  }
  std::string header =
      std::string("{'descr': '") + found->second + "', 'fortran_order': False, 'shape': (";
  for (const int64_t n : array.shape) header += std::to_string(n) + ", ";
  if (array.shape.size() > 1) header.resize(header.size() - 2);
  if (array.shape.size() == 1) header.pop_back();
  header += "), }";
  // Data starts at a multiple of 64 bytes, so that it can be mapped.
  constexpr size_t kFixed = sizeof kMagic + 4;
  header.append(63 - (kFixed + header.size()) % 64, ' ');
  header += '\n';
  const auto length = static_cast<uint16_t>(header.size());

  std::filesystem::path temporary = path;
  temporary.replace_filename("." + path.filename().string() + "." + std::to_string(getpid()) +
                             ".tmp");
  std::ofstream stream(temporary, std::ios::binary);
  stream.write(kMagic, sizeof kMagic);
  stream.write("\x01\x00", 2);
  stream.write(reinterpret_cast<const char*>(&length), sizeof length);
  stream << header;
  stream.write(reinterpret_cast<const char*>(array.data.get()),
               static_cast<std::streamsize>(array.bytes()));
  stream.close();
  std::error_code error;
  if (stream) std::filesystem::rename(temporary, path, error);
  if (!stream || error) {
    std::error_code ignored;
    std::filesystem::remove(temporary, ignored);
    throw std::runtime_error(path.string() + " cannot be written" +
                             (error ? ": " + error.message() : ""));
  }
}

}  // namespace weld
