// The memory of a tensor, of the exact size, `offset` elements into an allocation.
#pragma once

#include "buffer.h"
#include "kernels/cuda/batch_norm_walk.h"

namespace torchweld::kernels::cuda {

struct Memory {
  Memory(int64_t size, DType dtype, int64_t offset) : buffer(size + offset, dtype), size(size) {
    data = buffer.data.get() + offset * static_cast<int64_t>(size_of(dtype));
  }
  // Random values of both signs.
  Memory(int64_t size, DType dtype, int64_t offset, unsigned seed)
      : buffer(size + offset, dtype, seed, true), size(size) {
    data = buffer.data.get() + offset * static_cast<int64_t>(size_of(dtype));
  }
  double operator[](int64_t i) const { return read_channel({data, buffer.dtype, 0}, i); }

  Buffer buffer;
  int64_t size;
  char* data;
};

}  // namespace torchweld::kernels::cuda
