#include "kernels/cpu/capability.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace torchweld::kernels {
namespace {

constexpr const char* kNames[kCapabilityCount] = {"scalar", "avx2", "avx512", "avx512_vnni",
                                                  "avx512_bf16"};

#if defined(__x86_64__)
constexpr bool has_all(unsigned value, unsigned bits) { return (value & bits) == bits; }

// Register state the operating system saves on a context switch. Without it AVX instructions fault
// even where CPUID lists them (virtual machines, old kernels).
unsigned saved_register_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}
#endif

Capability decide(bool* ok, char* error, std::size_t error_size) {
  const Capability best = detect_capability();
  *ok = true;
  const char* forced = std::getenv("TORCHWELD_CPU_CAPABILITY");
  if (forced == nullptr || *forced == '\0') return best;
  for (std::size_t i = 0; i <= static_cast<std::size_t>(best); ++i) {
    if (std::strcmp(forced, kNames[i]) == 0) return static_cast<Capability>(i);
  }
  *ok = false;
  int used =
      std::snprintf(error, error_size,
                    "torchweld: TORCHWELD_CPU_CAPABILITY: expected one this machine can run (");
  for (std::size_t i = 0; i <= static_cast<std::size_t>(best); ++i) {
    used += std::snprintf(error + used, error_size - used, "%s%s", i ? ", " : "", kNames[i]);
  }
  std::snprintf(error + used, error_size - used, "), got \"%.64s\"", forced);
  return best;
}

}  // namespace

const char* name(Capability capability) { return kNames[static_cast<std::size_t>(capability)]; }

Capability detect_capability() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Capability::scalar;
  if (!has_all(c, bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE)) return Capability::scalar;
  const unsigned state = saved_register_state();
  if (!has_all(state, 0x6)) return Capability::scalar;  // XMM and YMM
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return Capability::scalar;
  constexpr unsigned avx512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  if (!has_all(b, avx512) || !has_all(state, 0xe6)) return Capability::avx2;  // and opmask, ZMM
  if (!(c & bit_AVX512VNNI)) return Capability::avx512;
  const unsigned subleaves = a;
  if (subleaves < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return Capability::avx512_vnni;
  return (a & bit_AVX512BF16) ? Capability::avx512_bf16 : Capability::avx512_vnni;
#else
  return Capability::scalar;
#endif
}

bool capability_in_use(Capability* capability, const char** error) {
  struct Decision {
    bool ok;
    Capability capability;
    char error[256];
  };
  static const Decision decision = [] {
    Decision d{};
    d.capability = decide(&d.ok, d.error, sizeof d.error);
    return d;
  }();
  *capability = decision.capability;
  *error = decision.error;
  return decision.ok;
}

}  // namespace torchweld::kernels
