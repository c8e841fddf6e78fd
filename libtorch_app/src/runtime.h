// What this process can run: torch, threads and registered operators. No torch header is included
// here, so that only the sources that implement it wait for torch's headers.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace weld {

std::string torch_version();

// Instruction set torch's own kernels use, such as "AVX512".
std::string torch_cpu_capability();

int threads();
void set_threads(int count);

// Loads a shared library that registers operators. Throws InputError if that fails.
void load_operators(const std::filesystem::path& library);

// Loads what torch and torchweld have for CUDA, and checks that there is the device: "cuda" or
// "cuda:1". Throws InputError with the reason if it cannot be used.
void load_cuda(const std::string& device);

struct Operator {
  std::string expected;                   // the schema a model was exported with
  std::optional<std::string> registered;  // the schema in this process
  bool usable;                            // registered, and takes every call the expected one takes
};

// Looks up the operator a schema declares. Throws InputError if the text is no schema.
Operator find_operator(const std::string& schema);

}  // namespace weld
