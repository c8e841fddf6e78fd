// Calls an operator through the dispatcher from a program with no Python in the process.
#include <torch/torch.h>
#include <torchweld/torchweld.h>

#include <iostream>

int main() {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("torchweld::grad_norm", "");
  const auto norm = op.typed<at::Tensor(at::TensorList)>().call({torch::full({3, 4}, 2.0)});
  std::cout << torchweld::version() << ' ' << torchweld::cpu_capability() << ' '
            << norm.item<double>() << '\n';
}
