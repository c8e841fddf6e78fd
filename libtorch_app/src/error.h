#pragma once

#include <stdexcept>

namespace weld {

// Something the user gave is unusable: a file, an option, an array. Exit code 2; anything else that
// goes wrong is exit code 1. The message is one sentence without a full stop.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace weld
