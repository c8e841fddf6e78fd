#include "ops/cpu/choose.h"

#include "ops/config.h"
#include "ops/cpu/rule.h"
#include "ops/kernels.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace {

using Rule = bool (*)(const ConvolutionShape& shape, int64_t threads, int64_t lanes);

// An algorithm and where it is expected to win.
struct Candidate {
  const char* name;
  Rule wins;
};

// Floats of a register.
int64_t lanes() {
  return &cpu_kernels() == &kernels::table(kernels::Capability::avx2) ? 8 : 16;
}

// The first candidate that can and is expected to win, or the one a user forces where it can.
template <class Can, size_t kCount>
const ConvolutionAlgorithm* choose(const ConvolutionShape& shape, const Can& can,
                                   const Candidate (&candidates)[kCount]) {
  const std::string_view forced = torchweld::convolution_algorithm();
  // Without fused multiply-add a register holds too little for any of them.
  const bool scalar = &cpu_kernels() == &kernels::table(kernels::Capability::scalar);
  if (forced == "aten" || (forced == "auto" && scalar)) return nullptr;
  for (const auto& [name, wins] : candidates) {
    const ConvolutionAlgorithm& algorithm = *find_algorithm(name);
    if (!can(algorithm)) continue;
    if (forced == name) return &algorithm;
    if (forced != "auto" || (name == std::string_view("winograd") && !config().winograd)) continue;
    if (wins(shape, get_num_threads(), lanes())) return &algorithm;
  }
  return nullptr;
}

}  // namespace

const ConvolutionAlgorithm* choose_forward(const ConvolutionShape& shape) {
  return choose(shape, [&](const ConvolutionAlgorithm& a) { return a.can_forward(shape); },
                {{"depthwise", rule::depthwise_forward},
                 {"winograd", rule::winograd_forward},
                 {"dense", rule::dense_forward}});
}

const ConvolutionAlgorithm* choose_folded(const ConvolutionShape& shape) {
  return choose(shape, [&](const ConvolutionAlgorithm& a) { return a.can_forward(shape); },
                {{"depthwise", rule::depthwise_folded},
                 {"winograd", rule::winograd_folded},
                 {"dense", rule::dense_folded}});
}

const ConvolutionAlgorithm* choose_backward(const ConvolutionShape& shape, bool input_grad,
                                            bool weight_grad) {
  return choose(
      shape,
      [&](const ConvolutionAlgorithm& a) { return a.can_backward(shape, input_grad, weight_grad); },
      {{"depthwise", rule::depthwise_backward},
       {"winograd", rule::winograd_backward},
       {"dense", rule::dense_backward}});
}

}  // namespace torchweld::ops
