// What kernels/cuda/async.h says of copies, on the emulator: made as late as they may be, so that a
// kernel that does not wait finds what was there before.
#pragma once

#include "../cuda_emulator.h"

#define TORCHWELD_DYNAMIC_SHARED(name) \
  unsigned char* const name = cuda_emulator::Block::current->shared()

namespace torchweld::kernels::cuda {

inline void copy_async(void* shared, const void* from, bool exists) {
  cuda_emulator::Block::current->copies().start(shared, exists ? from : nullptr);
}

inline void commit_copies() { cuda_emulator::Block::current->copies().commit(); }

template <int kGroups>
void wait_for_copies() {
  cuda_emulator::Block::current->copies().wait(kGroups);
}

}  // namespace torchweld::kernels::cuda
