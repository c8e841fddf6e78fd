#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace weld {

// SHA-256 as FIPS 180-4 defines it.
class Sha256 {
 public:
  void update(const void* data, size_t size);

  // The digest in lower-case hexadecimal. The object is used up.
  std::string hex_digest();

 private:
  void compress(const uint8_t* block);

  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> block_;
  size_t used_ = 0;  // bytes of block_ that wait for the rest
  uint64_t length_ = 0;
};

// Digest of a file. Throws InputError if it cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace weld
