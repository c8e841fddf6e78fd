// Build information and switches for Python. Passes no tensors: operators are reached through
// torch.ops. Where this module lies tells Python where the libraries lie, which stays right in
// editable installs.
#include <pybind11/pybind11.h>

#include "torchweld/config.h"
#include "torchweld/torchweld.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "torchweld: build information, CPU capability and switches";
  m.attr("__version__") = torchweld::version();
  m.attr("torch_abi_target") = torchweld::torch_abi_target();
  m.attr("cuda_architectures") = torchweld::cuda_architectures();
  m.def("cpu_capability", &torchweld::cpu_capability,
        "Instruction set the kernels run with; raises RuntimeError if the forced one is unusable.");
  m.def("available_cpu_capabilities", &torchweld::available_cpu_capabilities,
        "Comma-separated instruction sets this machine can run, best first.");
  m.def("winograd", &torchweld::winograd, "See torchweld.config.");
  m.def("set_winograd", &torchweld::set_winograd, "See torchweld.config.");
  m.def("convolution_algorithm", &torchweld::convolution_algorithm, "See torchweld.config.");
  m.def("set_convolution_algorithm", &torchweld::set_convolution_algorithm,
        "See torchweld.config.");
  m.def("memory_pool", &torchweld::memory_pool, "See torchweld.config.");
  m.def("set_memory_pool", &torchweld::set_memory_pool, "See torchweld.config.");
}
