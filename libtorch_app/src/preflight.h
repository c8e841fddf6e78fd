// What is checked before a model is loaded.
#pragma once

#include <filesystem>
#include <vector>

#include "manifest.h"
#include "runtime.h"

namespace weld {

// Throws InputError if there is no such file.
void check_exists(const std::filesystem::path& model);

// Throws InputError if the model is not the file its manifest was written for.
void check_digest(const std::filesystem::path& model, const Manifest& manifest);

// Throws InputError that shows expected and registered schemas of all operators that do not fit.
void check_operators(const std::vector<Operator>& operators);

// Throws InputError if the model takes another number of inputs than its manifest declares, or than
// its golden sample holds.
void check_input_count(size_t count, const Manifest& manifest);

// Throws InputError if the inputs do not have the declared dtypes and shapes.
void check_inputs(const std::vector<Array>& inputs, const Manifest& manifest);

}  // namespace weld
