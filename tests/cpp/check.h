// The little a test of a kernel needs: a check that says where and what, and the list of
// instruction sets to run.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernels/cpu/table.h"

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace torchweld::kernels {

inline std::vector<Capability> available_capabilities() {
  std::vector<Capability> capabilities;
  for (int i = 0; i <= static_cast<int>(detect_capability()); ++i) {
    capabilities.push_back(static_cast<Capability>(i));
  }
  return capabilities;
}

}  // namespace torchweld::kernels
