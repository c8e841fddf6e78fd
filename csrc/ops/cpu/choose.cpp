#include "ops/cpu/choose.h"

#include "ops/config.h"
#include "ops/cpu/rule.h"
#include "ops/kernels.h"
#include "ops/parallel.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {
namespace {

using Rule = std::function<bool(const ConvolutionShape& shape, int64_t threads, int64_t lanes)>;

// An algorithm and where it is expected to win.
struct Candidate {
  const char* name;
  Rule wins;
};

// Floats of a register.
int64_t lanes() { return &cpu_kernels() == &kernels::table(kernels::Capability::avx2) ? 8 : 16; }

// ATen's convolutions without instructions for bfloat16 were never compared with ours.
Rule in_bfloat16(const Rule& wins) {
  return [wins](const ConvolutionShape& shape, int64_t threads, int64_t lanes) {
    return cpu_kernels().gemm_bf16 != nullptr && wins(shape, threads, lanes);
  };
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

const ConvolutionAlgorithm* choose_folded(const ConvolutionShape& shape, int64_t packed_size) {
  const auto can = [&](const ConvolutionAlgorithm& a) { return a.can_forward(shape); };
  const auto is_packed_for = [&](const ConvolutionAlgorithm& a) {
    return can(a) && a.packed_size(shape) == packed_size;
  };
  const Rule always = [](const ConvolutionShape&, int64_t, int64_t) { return true; };
  const ConvolutionAlgorithm* chosen =
      shape.dtype == kernels::DType::bfloat16
          ? choose(shape, can,
                   {{"depthwise", in_bfloat16(rule::depthwise_folded_bf16)},
                    {"winograd", in_bfloat16(rule::winograd_folded_bf16)},
                    {"dense", in_bfloat16(rule::dense_folded_bf16)}})
          : choose(shape, can,
                   {{"depthwise", rule::depthwise_folded},
                    {"winograd", rule::winograd_folded},
                    {"dense", rule::dense_folded}});
  if (!chosen || packed_size == 0) return chosen;
  // The size says which: where two algorithms pack one weight to the same size, their bytes are the
  // same too. What was packed in another dtype, as it is under autocast, has a size of its own or
  // serves both.
  const ConvolutionAlgorithm* packed_for = choose(
      shape, is_packed_for, {{"depthwise", always}, {"winograd", always}, {"dense", always}});
  return packed_for ? packed_for : chosen;
}

const ConvolutionAlgorithm* choose_backward(const ConvolutionShape& shape, bool input_grad,
                                            bool weight_grad) {
  // The first layer of a network: the rule was fitted before the input's gradient of few channels
  // was spread, and where the vendor's weight gradient of them did not stand alone. Both take it
  // twice as long, or more; but one image is one task of ours.
  const auto dense = [&](const ConvolutionShape& s, int64_t threads, int64_t lanes) {
    const bool is_shared = !input_grad || 3 * s.batch >= threads;
    return (s.channels < 8 && is_shared) || rule::dense_backward(s, threads, lanes);
  };
  return choose(
      shape,
      [&](const ConvolutionAlgorithm& a) { return a.can_backward(shape, input_grad, weight_grad); },
      {{"depthwise", rule::depthwise_backward},
       {"winograd", rule::winograd_backward},
       {"dense", dense}});
}

}  // namespace torchweld::ops
