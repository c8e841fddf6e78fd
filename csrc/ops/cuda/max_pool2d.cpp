// On a GPU max_pool2d is ATen's: the operator exists so that an exported model runs there.
#include "ops/max_pool2d.h"

namespace torchweld::ops {
namespace {

Tensor max_pool2d(Tensor input, IntList kernel_size, IntList stride, IntList padding,
                  IntList dilation, bool ceil_mode) {
  const NoGradGuard no_grad;
  const MaxPool2d pool("max_pool2d", kernel_size, stride, padding, dilation, ceil_mode);
  check_max_pool2d(pool, input);
  return aten::max_pool2d(input, pool);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchweld, CUDA, m) { m.impl("max_pool2d", TORCH_BOX(&max_pool2d)); }

}  // namespace torchweld::ops
