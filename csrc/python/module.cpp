// Build information for Python. Passes no tensors: operators are reached through torch.ops. Where
// this module lies tells Python where the libraries lie, which stays right in editable installs.
#include <pybind11/pybind11.h>

#include "torchweld/torchweld.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchweld: build information and CPU capability";
  m.attr("__version__") = torchweld::version();
  m.attr("torch_abi_target") = torchweld::torch_abi_target();
  m.def("cpu_capability", &torchweld::cpu_capability,
        "Instruction set the kernels run with; raises RuntimeError if the forced one is unusable.");
  m.def("available_cpu_capabilities", &torchweld::available_cpu_capabilities,
        "Comma-separated instruction sets this machine can run, best first.");
}
