#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "check.h"

using namespace torchweld::kernels;

namespace {

// The choice is made once per process, so each value of the variable is tried in a child.
// Exit status: the capability in use, or 100 when the variable was refused.
int choice_with(const char* value) {
  const pid_t child = fork();
  if (child == 0) {
    if (value != nullptr) {
      setenv("TORCHWELD_CPU_CAPABILITY", value, 1);
    } else {
      unsetenv("TORCHWELD_CPU_CAPABILITY");
    }
    Capability capability;
    const char* error;
    if (capability_in_use(&capability, &error)) _exit(static_cast<int>(capability));
    const bool says_what_came = std::strstr(error, value) != nullptr;
    const bool says_what_is_expected = std::strstr(error, "scalar") != nullptr;
    _exit(says_what_came && says_what_is_expected ? 100 : 101);
  }
  int status;
  waitpid(child, &status, 0);
  return WEXITSTATUS(status);
}

}  // namespace

int main() {
  const int best = static_cast<int>(detect_capability());
  CHECK(choice_with(nullptr) == best, "default");
  CHECK(choice_with("") == best, "empty means default");
  for (size_t i = 0; i < kCapabilityCount; ++i) {
    const char* forced = name(static_cast<Capability>(i));
    const int expected = static_cast<int>(i) <= best ? static_cast<int>(i) : 100;
    CHECK(choice_with(forced) == expected, "%s", forced);
  }
  for (const char* unknown : {"AVX2", "avx1024", "avx2 "}) {
    CHECK(choice_with(unknown) == 100, "%s", unknown);
  }
}
