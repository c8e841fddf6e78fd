#include "runtime.h"

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Device.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/version.h>
#include <torchweld/torchweld.h>

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

// The library `name` in the directory of the one that holds `function`.
template <class F>
std::filesystem::path beside(F* function, const char* name) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(function), &info) == 0) return name;
  return std::filesystem::path(info.dli_fname).parent_path() / name;
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

void load_cuda(const std::string& device) {
  const std::string option = "--device " + device + ": ";
  const std::pair<std::filesystem::path, const char*> libraries[] = {
      {beside(&at::get_cpu_capability, "libtorch_cuda.so"), "this torch is built without CUDA"},
      {beside(&torchweld::version, "libtorchweld_cuda.so"), "this torchweld is built without CUDA"},
  };
  for (const auto& [library, without] : libraries) {
    if (!std::filesystem::exists(library)) {
      throw InputError(option + without + "; there is no " + library.string());
    }
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw InputError(option + dlerror());
    }
  }
  const int count = at::detail::getCUDAHooks().deviceCount();
  if (count == 0) throw InputError(option + "no GPU was found, or its driver does not work");
  const int index = c10::Device(device).index();  // -1 without a number
  if (index >= count) {
    throw InputError(option + "there are " + std::to_string(count) + " GPUs, from cuda:0 on");
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
