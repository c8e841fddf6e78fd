#include "preflight.h"

#include <algorithm>

#include "error.h"
#include "sha256.h"

namespace weld {
namespace {

bool fits(const Shape& shape, const Shape& declared) {
  return std::equal(
      shape.begin(), shape.end(), declared.begin(), declared.end(),
      [](int64_t size, int64_t expected) { return expected == -1 || size == expected; });
}

}  // namespace

void check_exists(const std::filesystem::path& model) {
  if (!std::filesystem::exists(model)) throw InputError(model.string() + " does not exist");
  if (!std::filesystem::is_regular_file(model)) {
    throw InputError(model.string() + " is not a regular file");
  }
}

void check_digest(const std::filesystem::path& model, const Manifest& manifest) {
  const std::string digest = sha256_of_file(model);
  if (digest != manifest.sha256) {
    throw InputError(model.string() + " is truncated or was changed: its SHA-256 is " + digest +
                     ", its manifest " + manifest.path.string() + " says " + manifest.sha256);
  }
}

void check_operators(const std::vector<Operator>& operators) {
  std::string unusable;
  for (const Operator& op : operators) {
    if (op.usable) continue;
    unusable += "\n  expected    " + op.expected + "\n  registered  " +
                op.registered.value_or("nothing of that name");
  }
  if (!unusable.empty()) {
    throw InputError(
        "the model needs operators that are not registered as it expects them (--ops LIB loads a "
        "library):" +
        unusable);
  }
}

void check_input_count(size_t count, const Manifest& manifest) {
  for (const size_t declared : {manifest.inputs.size(), manifest.golden_inputs.size()}) {
    if (declared == count) continue;
    throw InputError("manifest " + manifest.path.string() + " cannot be used: it declares " +
                     std::to_string(declared) + " inputs, the model takes " +
                     std::to_string(count));
  }
}

void check_inputs(const std::vector<Array>& inputs, const Manifest& manifest) {
  const TensorSpec* free = nullptr;
  int64_t batch = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const TensorSpec& spec = manifest.inputs[i];
    const Shape& shape = inputs[i].shape;
    if (inputs[i].dtype != spec.dtype || !fits(shape, spec.shape)) {
      throw InputError("input " + spec.name + ": expected " + to_string(spec) + ", got " +
                       name(inputs[i].dtype) + " " + to_string(shape));
    }
    if (spec.shape.empty() || spec.shape[0] != -1) continue;
    if (free != nullptr && shape[0] != batch) {
      throw InputError("input " + spec.name + ": expected " + std::to_string(batch) +
                       " rows as in input " + free->name + ", got " + std::to_string(shape[0]));
    }
    free = &spec;
    batch = shape[0];
  }
}

}  // namespace weld
