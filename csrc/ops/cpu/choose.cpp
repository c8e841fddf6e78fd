#include "ops/cpu/choose.h"

#include <initializer_list>
#include <string_view>

#include "ops/config.h"
#include "ops/kernels.h"

namespace torchweld::ops {
namespace {

// The first of these algorithms that can; null if none can.
template <class Can>
const ConvolutionAlgorithm* first(const Can& can, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    const ConvolutionAlgorithm* algorithm = find_algorithm(name);
    if (algorithm && can(*algorithm)) return algorithm;
  }
  return nullptr;
}

// --- the rule ------------------------------------------------------------------------------------
bool is_wide(const ConvolutionShape& s) { return s.channels >= 16 && s.out_channels >= 16; }
bool is_pointwise(const ConvolutionShape& s) { return s.kernel_height == 1 && s.kernel_width == 1; }

// The rule for both directions: what is expected to win over ATen, the fastest first.
template <class Can>
const ConvolutionAlgorithm* choose(const ConvolutionShape& s, const Can& can) {
  const std::string_view forced = torchweld::convolution_algorithm();
  if (forced != "auto") return first(can, {forced.data()});
  // Without fused multiply-add a register holds too little for any of them.
  if (&cpu_kernels() == &kernels::table(kernels::Capability::scalar)) return nullptr;
  if (s.groups > 1) return first(can, {"depthwise"});
  if (is_wide(s) && config().winograd) {
    if (const ConvolutionAlgorithm* winograd = first(can, {"winograd"})) return winograd;
  }
  return is_pointwise(s) || !is_wide(s) ? first(can, {"dense"}) : nullptr;
}

}  // namespace

const ConvolutionAlgorithm* choose_forward(const ConvolutionShape& shape, bool prepacked) {
  (void)prepacked;
  return choose(shape, [&](const ConvolutionAlgorithm& a) { return a.can_forward(shape); });
}

const ConvolutionAlgorithm* choose_backward(const ConvolutionShape& shape, bool input_grad,
                                            bool weight_grad) {
  return choose(shape, [&](const ConvolutionAlgorithm& a) {
    return a.can_backward(shape, input_grad, weight_grad);
  });
}

}  // namespace torchweld::ops
