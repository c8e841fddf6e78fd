#pragma once

#include "options.h"

namespace weld {

// Each returns the exit code; what goes wrong is thrown.
int inspect(const InspectOptions& options);
int predict(const PredictOptions& options);

}  // namespace weld
