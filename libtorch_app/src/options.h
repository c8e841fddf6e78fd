// The command line.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace weld {

struct InspectOptions {
  std::filesystem::path model;
  std::vector<std::filesystem::path> ops;
};

struct PredictOptions {
  std::filesystem::path model;
  std::vector<std::string> inputs;  // "x.npy" or "name=x.npy"
  std::optional<std::filesystem::path> output;
  int64_t top_k = 5;
  std::optional<int64_t> batch_size;
  std::optional<int64_t> threads;
  std::string device = "cpu";
  std::vector<std::filesystem::path> ops;
};

struct ShowText {
  std::string text;
};
struct ShowVersion {};

using Command = std::variant<ShowText, ShowVersion, InspectOptions, PredictOptions>;

// Throws InputError on a command line that says nothing or too much.
Command parse_command_line(int argc, char** argv);

}  // namespace weld
