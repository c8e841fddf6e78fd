// The manifest torchweld.export writes beside a model: m.json for m.pt.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "array.h"

namespace weld {

struct TensorSpec {
  std::string name;
  DType dtype;
  Shape shape;  // -1: any size
};

// "float32 [-1, 10]"
std::string to_string(const TensorSpec& spec);

struct Manifest {
  std::filesystem::path path;
  std::string sha256;
  std::string torch_version;
  std::string torchweld_version;
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  std::vector<std::string> ops;  // schemas
  std::vector<Array> golden_inputs;
  std::vector<Array> golden_outputs;
};

// The manifest of a model, nothing if it has none. Throws InputError if it is corrupted.
std::optional<Manifest> read_manifest(const std::filesystem::path& model);

}  // namespace weld
