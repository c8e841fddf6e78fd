// One table of kernels per instruction set.
#pragma once

#include "kernels/adamw.h"
#include "kernels/cpu/capability.h"
#include "kernels/quantized_linear.h"

namespace torchweld::kernels {

struct KernelTable {
  const AdamWKernels* adamw;
  const QuantizedLinearKernels* quantized_linear;
};

// The kernels compiled for an instruction set. Call only one this machine can run.
const KernelTable& table(Capability capability);

}  // namespace torchweld::kernels
