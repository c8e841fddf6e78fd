// NumPy's .npy files, versions 1 to 3: little-endian, C order.
// Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
#pragma once

#include <filesystem>
#include <string>

#include "array.h"

namespace weld {

// Throws InputError naming the file if it is missing, truncated, too long, no .npy, or holds
// Fortran order, big-endian numbers or a dtype weld does not know.
Array read_npy(const std::filesystem::path& path);

// Writes under a temporary name and renames, so that `path` holds the old file or the whole new
// one. Throws InputError for a dtype .npy has no name for, std::runtime_error if writing fails.
void write_npy(const std::filesystem::path& path, const Array& array);

}  // namespace weld
