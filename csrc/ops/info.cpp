#include <stdexcept>
#include <string>

#include "ops/kernels.h"
#include "torchweld/torchweld.h"

namespace torchweld {
namespace {

kernels::Capability capability() {
  kernels::Capability capability;
  const char* error;
  if (!kernels::capability_in_use(&capability, &error)) throw std::runtime_error(error);
  return capability;
}

}  // namespace

const char* version() { return TORCHWELD_VERSION; }

const char* torch_abi_target() { return TORCHWELD_TORCH_FLOOR; }

const char* cpu_capability() { return kernels::name(capability()); }

const char* available_cpu_capabilities() {
  static const std::string names = [] {
    std::string joined;
    for (int i = static_cast<int>(kernels::detect_capability()); i >= 0; --i) {
      joined += kernels::name(static_cast<kernels::Capability>(i));
      if (i > 0) joined += ",";
    }
    return joined;
  }();
  return names.c_str();
}

const char* cuda_architectures() { return TORCHWELD_CUDA_ARCHITECTURES; }

void ensure_registered() {}

const kernels::KernelTable& ops::cpu_kernels() {
  static const kernels::KernelTable& table = kernels::table(capability());
  return table;
}

}  // namespace torchweld
