#include "manifest.h"

#include <cstring>
#include <fstream>
#include <utility>

#include <nlohmann/json.hpp>

#include "error.h"

namespace weld {
namespace {

using Json = nlohmann::json;

constexpr int64_t kFormatVersion = 1;

// Thrown while a document is read; read_manifest adds the name of the file.
[[noreturn]] void fail(const std::string& what) { throw InputError(what); }

// nlohmann converts 1.5 and true to an integer; a manifest holds neither.
int64_t integer(const Json& json) {
  if (!json.is_number_integer()) fail("expected an integer, got " + json.dump());
  return json.get<int64_t>();
}

DType dtype(const Json& json) {
  const auto text = json.get<std::string>();
  const auto found = dtype_from_name(text);
  if (!found) fail("unknown dtype " + text);
  return *found;
}

Shape shape(const Json& json, int64_t lowest) {
  if (!json.is_array()) fail("expected a shape, got " + json.dump());
  Shape result;
  for (const Json& size : json) {
    result.push_back(integer(size));
    if (result.back() < lowest) fail("shape " + json.dump() + " has a negative size");
  }
  return result;
}

std::vector<std::byte> decode_base64(const std::string& text) {
  if (text.size() % 4 != 0) fail("base64 data is truncated");
  std::vector<std::byte> bytes;
  bytes.reserve(text.size() / 4 * 3);
  uint32_t bits = 0;
  int count = 0;
  const size_t end = text.find_last_not_of('=') + 1;
  for (size_t i = 0; i < end; ++i) {
    static constexpr char kDigits[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const auto* digit = static_cast<const char*>(std::memchr(kDigits, text[i], 64));
    if (digit == nullptr) fail("base64 data is corrupted");
    bits = bits << 6 | static_cast<uint32_t>(digit - kDigits);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes.push_back(static_cast<std::byte>(bits >> count & 0xff));
    }
  }
  return bytes;
}

std::vector<TensorSpec> specs(const Json& list) {
  std::vector<TensorSpec> result;
  for (const Json& json : list) {
    result.push_back(
        {json.at("name").get<std::string>(), dtype(json.at("dtype")), shape(json.at("shape"), -1)});
  }
  return result;
}

std::vector<Array> arrays(const Json& list) {
  std::vector<Array> result;
  for (const Json& json : list) {
    const auto bytes = decode_base64(json.at("data").get<std::string>());
    const DType type = dtype(json.at("dtype"));
    Shape sizes = shape(json.at("shape"), 0);
    // Compared in floating point, which cannot overflow, before anything is allocated.
    double expected = static_cast<double>(size_of(type));
    for (const int64_t size : sizes) expected *= static_cast<double>(size);
    if (expected != static_cast<double>(bytes.size())) {
      fail("the golden sample of shape " + to_string(sizes) + " holds " +
           std::to_string(bytes.size()) + " bytes");
    }
    Array array(type, std::move(sizes));
    std::memcpy(array.data.get(), bytes.data(), bytes.size());
    result.push_back(std::move(array));
  }
  return result;
}

Manifest parse(std::istream& stream) {
  const Json json = Json::parse(stream);
  const int64_t version = integer(json.at("format_version"));
  if (version != kFormatVersion) {
    fail("it has format_version " + std::to_string(version) + ", this program reads " +
         std::to_string(kFormatVersion));
  }
  if (const auto format = json.at("format").get<std::string>(); format != "torchscript") {
    fail("it describes a model of format " + format + ", this program runs torchscript");
  }
  return {.path = {},
          .sha256 = json.at("sha256").get<std::string>(),
          .torch_version = json.at("torch_version").get<std::string>(),
          .torchweld_version = json.at("torchweld_version").get<std::string>(),
          .inputs = specs(json.at("inputs")),
          .outputs = specs(json.at("outputs")),
          .ops = json.at("ops").get<std::vector<std::string>>(),
          .golden_inputs = arrays(json.at("golden").at("inputs")),
          .golden_outputs = arrays(json.at("golden").at("outputs"))};
}

}  // namespace

std::string to_string(const TensorSpec& spec) {
  return std::string(name(spec.dtype)) + " " + to_string(spec.shape);
}

std::optional<Manifest> read_manifest(const std::filesystem::path& model) {
  std::filesystem::path path = model;
  path.replace_extension(".json");
  if (!std::filesystem::exists(path)) return std::nullopt;
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw InputError("manifest " + path.string() + " cannot be opened");
  std::string reason;
  try {
    Manifest manifest = parse(stream);
    manifest.path = std::move(path);
    return manifest;
  } catch (const InputError& error) {
    reason = error.what();
  } catch (const Json::exception& error) {
    // Without its "[json.exception.out_of_range.403] ".
    reason = error.what();
    if (const size_t prefix = reason.find("] "); prefix != std::string::npos) {
      reason.erase(0, prefix + 2);
    }
  }
  throw InputError("manifest " + path.string() + " cannot be used: " + reason);
}

}  // namespace weld
