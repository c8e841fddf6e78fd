// Which instruction set the kernels run with.
#pragma once

#include <cstddef>

namespace torchweld::kernels {

// In ascending order: each one includes those before it.
enum class Capability { scalar, avx2, avx512, avx512_vnni, avx512_bf16 };
inline constexpr std::size_t kCapabilityCount = 5;

// The name users write in TORCHWELD_CPU_CAPABILITY.
const char* name(Capability capability);

// The best one this CPU has and this operating system saves the registers of (CPUID and XGETBV).
Capability detect_capability();

// Detected, or forced by TORCHWELD_CPU_CAPABILITY; decided once. On an unknown or unsupported name
// returns false and points error at a sentence that says what would be accepted.
bool capability_in_use(Capability* capability, const char** error);

}  // namespace torchweld::kernels
