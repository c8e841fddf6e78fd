#include "ops/config.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

#include "ops/memory.h"

namespace torchweld {
namespace {

constexpr const char* kNames[ops::kAlgorithmCount] = {"auto",     "aten",      "dense",
                                                      "winograd", "depthwise", "cudnn"};

std::runtime_error misfit(const char* what, const std::string& expected, const std::string& got) {
  return std::runtime_error(std::string("torchweld: ") + what + ": expected " + expected +
                            ", got \"" + got + "\"");
}

ops::Algorithm to_algorithm(const char* what, const std::string& name) {
  for (std::size_t i = 0; i < ops::kAlgorithmCount; ++i) {
    if (name == kNames[i]) return static_cast<ops::Algorithm>(i);
  }
  throw misfit(what, "auto, aten, dense, winograd, depthwise or cudnn", name);
}

bool to_switch(const char* what, const std::string& value) {
  if (value != "0" && value != "1") throw misfit(what, "0 or 1", value);
  return value == "1";
}

int64_t to_bytes(const char* what, const std::string& value) {
  char* end;
  errno = 0;
  const long long bytes = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end != '\0' || bytes < 0 || errno == ERANGE)
    throw misfit(what, "a count of bytes", value);
  return bytes;
}

// The machine's memory, or what the container may use of it.
int64_t memory() {
  int64_t bytes = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGE_SIZE);
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t limit;
    if (std::ifstream(path) >> limit) bytes = std::min(bytes, limit);  // not where it says "max"
  }
  return bytes;
}

int64_t default_memory_pool() {
  const int64_t bytes = memory();
  return std::clamp<int64_t>(bytes / 4, 0, int64_t{4} << 30);
}

// What an environment variable says, or `otherwise` without one.
template <class T, class Parse>
T from_environment(const char* name, const Parse& parse, T otherwise) {
  const char* value = std::getenv(name);
  return value ? parse(name, value) : otherwise;
}

}  // namespace

ops::Config& ops::config() {
  static Config config{
      from_environment("TORCHWELD_WINOGRAD", to_switch, true),
      from_environment("TORCHWELD_CONVOLUTION", to_algorithm, Algorithm::automatic),
      from_environment("TORCHWELD_MEMORY_POOL", to_bytes, default_memory_pool())};
  return config;
}

bool winograd() { return ops::config().winograd; }
void set_winograd(bool on) { ops::config().winograd = on; }

const char* convolution_algorithm() {
  return kNames[static_cast<std::size_t>(ops::config().convolution.load())];
}
void set_convolution_algorithm(const char* name) {
  ops::config().convolution = to_algorithm("convolution_algorithm", name);
}

int64_t memory_pool() { return ops::config().memory_pool; }
void set_memory_pool(int64_t bytes) {
  if (bytes < 0) throw misfit("memory_pool", "a count of bytes", std::to_string(bytes));
  ops::config().memory_pool = bytes;
  ops::trim_memory_pool();
}

}  // namespace torchweld
