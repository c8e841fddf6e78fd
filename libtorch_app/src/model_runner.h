#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "array.h"

namespace weld {

// A loaded model. What file format it came from is its own affair.
class ModelRunner {
 public:
  struct Size {
    int64_t tensors;
    int64_t elements;
    int64_t bytes;
  };

  virtual ~ModelRunner() = default;

  virtual std::vector<std::string> input_names() const = 0;

  // Schemas of the operators it calls that are not torch's own, sorted.
  virtual std::vector<std::string> operators() const = 0;

  // Parameters and buffers.
  virtual Size size() const = 0;

  // Runs once on inputs in the order of input_names(). Throws std::runtime_error with the reason in
  // one line if the model fails.
  virtual std::vector<Array> run(const std::vector<Array>& inputs) = 0;
};

// Loads a model for inference on a device, "cpu" or one that load_cuda() was called for; what the
// file holds decides how, not its name. Throws InputError if it is missing, truncated, of a foreign
// format, or calls unregistered operators.
std::unique_ptr<ModelRunner> load_model(const std::filesystem::path& path,
                                        const std::string& device = "cpu");

}  // namespace weld
