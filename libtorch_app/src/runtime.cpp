#include "runtime.h"

#include <dlfcn.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/version.h>

#include "error.h"

namespace weld {

std::string torch_version() { return TORCH_VERSION; }

std::string torch_cpu_capability() { return at::get_cpu_capability(); }

int threads() { return at::get_num_threads(); }

void set_threads(int count) { at::set_num_threads(count); }

void load_operators(const std::filesystem::path& library) {
  if (!std::filesystem::exists(library)) {
    throw InputError("operator library " + library.string() + " does not exist");
  }
  // The linked library under another path would register the same operators twice, which torch
  // refuses in the middle of dlopen.
  if (library.filename() == "libtorchweld_ops.so") return;
  // dlopen searches for a name without a slash in the system's directories.
  const std::string path = std::filesystem::absolute(library).string();
  try {
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  } catch (const std::exception& error) {
    throw InputError("operator library " + path + " failed to register: " + error.what());
  }
  throw InputError(std::string("operator library cannot be loaded: ") + dlerror());
}

Operator find_operator(const std::string& schema) {
  try {
    const c10::FunctionSchema expected = torch::jit::parseSchema(schema);
    const auto found = torch::jit::findOperatorFor(expected.operator_name());
    if (!found) return {schema, std::nullopt, false};
    return {schema, c10::toString(found->schema()),
            found->schema().isBackwardCompatibleWith(expected)};
  } catch (const std::exception&) {
    throw InputError("\"" + schema + "\" is not an operator schema");
  }
}

}  // namespace weld
