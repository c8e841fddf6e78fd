// One table of kernels per instruction set.
#pragma once

#include "kernels/adamw.h"
#include "kernels/cpu/capability.h"

namespace torchweld::kernels {

struct KernelTable {
  const AdamWKernels* adamw;
};

// The kernels compiled for an instruction set. Call only one this machine can run.
const KernelTable& table(Capability capability);

}  // namespace torchweld::kernels
