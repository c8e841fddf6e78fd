#include "runtime.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/version.h>

#include <iostream>

#include "error.h"

namespace weld {
namespace {

// Loads the library in a child process first: torch 2.13 crashes inside dlopen where a library
// registers operators a second time. No thread is running yet, so that fork is safe.
bool survives_loading(const std::string& path) {
  const pid_t child = fork();
  if (child == 0) {
    dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    _exit(0);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace

std::string torch_version() { return TORCH_VERSION; }

std::string torch_cpu_capability() { return at::get_cpu_capability(); }

int threads() { return at::get_num_threads(); }

void set_threads(int count) { at::set_num_threads(count); }

void load_operators(const std::filesystem::path& library) {
  if (!std::filesystem::exists(library)) {
    throw InputError("operator library " + library.string() + " does not exist");
  }
  if (library.filename() == "libtorchweld_ops.so") {
    std::cerr << "weld: note: " << library.string()
              << " is not loaded, this program is linked to torchweld's operators\n";
    return;
  }
  // dlopen searches for a name without a slash in the system's directories.
  const std::string path = std::filesystem::absolute(library).string();
  if (!survives_loading(path)) {
    throw InputError("operator library " + path +
                     " crashes when loaded; are its operators registered already?");
  }
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw InputError(std::string("operator library cannot be loaded: ") + dlerror());
  }
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
