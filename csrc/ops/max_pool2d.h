// What every back end of max_pool2d checks and derives before it touches memory.
#pragma once

#include "ops/aten.h"
#include "ops/torch_compat.h"

namespace torchweld::ops {

struct MaxPool2d {
  // An empty stride is that of the window. Throws unless ATen's pooling would take the arguments.
  MaxPool2d(const char* op, IntList kernel_size, IntList stride, IntList padding, IntList dilation,
            bool ceil_mode);

  // Of the output along rows (0) or columns (1), for an input of `size`. Throws if there is none.
  int64_t output_size(int axis, int64_t size) const;

  int64_t taps() const { return kernel[0] * kernel[1]; }

  const char* op;
  IntList kernel, stride, padding, dilation;
  bool ceil_mode;
};

// Throws unless `input` has what pooling needs: [N, C, H, W] or [C, H, W], N alone may be 0.
void check_max_pool2d(const MaxPool2d& pool, const Tensor& input);

namespace aten {

Tensor max_pool2d(const Tensor& input, const MaxPool2d& pool);

}  // namespace aten
}  // namespace torchweld::ops
