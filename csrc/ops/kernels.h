// The kernels of the instruction set in use.
#pragma once

#include "kernels/cpu/table.h"

namespace torchweld::ops {

// Throws std::runtime_error when TORCHWELD_CPU_CAPABILITY names one that cannot be used.
const kernels::KernelTable& cpu_kernels();

}  // namespace torchweld::ops
