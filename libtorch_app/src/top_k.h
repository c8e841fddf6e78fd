#pragma once

#include <cstdint>
#include <iosfwd>

#include "array.h"

namespace weld {

// Shows an output: for [rows, classes] of floating point the k most probable classes of the first
// rows, otherwise dtype, shape and range.
void show_output(std::ostream& out, const std::string& title, const Array& output, int64_t k);

}  // namespace weld
