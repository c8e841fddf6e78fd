#include "options.h"

#include <getopt.h>

#include <charconv>
#include <cstring>
#include <limits>

#include "error.h"

namespace weld {
namespace {

constexpr const char* kHelp =
    R"(weld runs models exported from PyTorch by torchweld. There is no Python in the process.

Usage:
  weld inspect MODEL              what a model takes, gives and needs
  weld predict MODEL --input X    run a model on .npy arrays
  weld COMMAND --help             options and examples of a command
  weld --version

A model is a file written by torchweld.export(model, example_inputs, "m.pt"), with its manifest
m.json beside it. A file of torch.jit.save without a manifest works too; then nothing is known
about the inputs, and less is checked.

Exit codes:
  0  done
  1  the model failed while it ran, or the output could not be written
  2  what was given cannot be used: the command line, a missing, damaged or foreign file, inputs of
     a wrong dtype or shape, an operator that is missing
)";

constexpr const char* kInspectHelp =
    R"(weld inspect shows what a model takes, gives and needs, and whether it runs here.

Usage:
  weld inspect MODEL [--ops LIB]...

It shows inputs and outputs (a size of -1 is free: the batch), the operators the model needs beyond
torch's own and whether this program has them, versions, parameters, the CPU's instruction set, and
whether the golden sample of the manifest is reproduced on this machine.

Options:
  --ops LIB    also load operators from this shared library; may be repeated
  -h, --help   show this text

Example:
  weld inspect digits.pt
)";

constexpr const char* kPredictHelp =
    R"(weld predict runs a model on NumPy arrays.

Usage:
  weld predict MODEL --input X.npy [OPTION]...

For outputs of shape [rows, classes] the most probable classes of the first rows are shown, with
their probabilities (softmax); for others a summary. --output writes the raw outputs.

Options:
  -i, --input [NAME=]X.npy   an input, little-endian and in C order (numpy.save writes that); repeat
                             it for a model of several inputs, in their order or by NAME
  -o, --output Y.npy         write the raw outputs; several outputs go to Y.0.npy, Y.1.npy, ...
  -k, --top-k K              classes to show per row (default 5; 0 shows nothing)
  -b, --batch-size N         run N rows at a time instead of all at once; the last batch may be smaller
  -t, --threads N            threads to compute with (default: torch's choice)
  -d, --device DEVICE        where to compute: cpu (the default), cuda, or cuda:N for GPU N
      --ops LIB              also load operators from this shared library; may be repeated
  -h, --help                 show this text

Examples:
  weld predict digits.pt --input images.npy
  weld predict digits.pt --input images.npy --batch-size 64 --output logits.npy
  weld predict pair.pt --input left=a.npy --input right=b.npy
  weld predict digits.pt --input images.npy --device cuda
)";

enum Option { kOps = 1000 };

constexpr option kInspectOptions[] = {
    {"ops", required_argument, nullptr, kOps}, {"help", no_argument, nullptr, 'h'}, {}};

constexpr option kPredictOptions[] = {{"input", required_argument, nullptr, 'i'},
                                      {"output", required_argument, nullptr, 'o'},
                                      {"top-k", required_argument, nullptr, 'k'},
                                      {"batch-size", required_argument, nullptr, 'b'},
                                      {"threads", required_argument, nullptr, 't'},
                                      {"device", required_argument, nullptr, 'd'},
                                      {"ops", required_argument, nullptr, kOps},
                                      {"help", no_argument, nullptr, 'h'},
                                      {}};

int64_t parse_integer(const char* option, const char* text, int64_t lowest, int64_t highest) {
  int64_t value;
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < lowest || value > highest) {
    throw InputError(std::string(option) + " takes a whole number from " + std::to_string(lowest) +
                     " to " + std::to_string(highest) + ", got \"" + text + "\"");
  }
  return value;
}

std::string parse_device(const std::string& text) {
  if (text == "cpu" || text == "cuda") return text;
  if (text.starts_with("cuda:")) {
    constexpr int64_t kMost = 127;  // what torch can number
    return "cuda:" + std::to_string(parse_integer("--device cuda:", text.c_str() + 5, 0, kMost));
  }
  throw InputError("--device takes cpu, cuda or cuda:N, got \"" + text + '"');
}

// argv starts at the command's name here. Calls handle(option) for each option.
template <class F>
void parse_options(int argc, char** argv, const char* short_options, const option* long_options,
                   const F& handle) {
  const std::string command = argv[0];
  optind = 1;
  opterr = 0;
  int code;
  while ((code = getopt_long(argc, argv, short_options, long_options, nullptr)) != -1) {
    std::string word = argv[optind - 1];
    if (code == '?' || code == ':') {
      // Inside a group such as -zk getopt has not moved on yet; optopt is the letter.
      if (code == '?' && optopt != 0 && !word.starts_with("--")) {
        word = {'-', static_cast<char>(optopt)};
      }
      throw InputError(word +
                       (code == ':' ? " needs a value" : " is not an option of weld " + command) +
                       "; see weld " + command + " --help");
    }
    if (optarg != nullptr && *optarg == '\0') {
      // An unset variable in a script. The option stands before its value, unless joined by "=".
      if (word.empty()) word = argv[optind - 2];
      throw InputError(word + " has an empty value");
    }
    handle(code);
  }
}

std::filesystem::path model_argument(int argc, char** argv) {
  if (argc - optind != 1) {
    throw InputError(std::string("weld ") + argv[0] + " takes one model, got " +
                     std::to_string(argc - optind) + "; see weld " + argv[0] + " --help");
  }
  if (*argv[optind] == '\0') throw InputError("the name of the model is empty");
  return argv[optind];
}

Command parse_inspect(int argc, char** argv) {
  InspectOptions options;
  bool help = false;
  parse_options(argc, argv, ":h", kInspectOptions, [&](int code) {
    if (code == 'h') help = true;
    if (code == kOps) options.ops.emplace_back(optarg);
  });
  if (help) return ShowText{kInspectHelp};
  options.model = model_argument(argc, argv);
  return options;
}

Command parse_predict(int argc, char** argv) {
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  constexpr int64_t kMaxThreads = 4096;
  PredictOptions options;
  bool help = false;
  parse_options(argc, argv, ":i:o:k:b:t:d:h", kPredictOptions, [&](int code) {
    if (code == 'h') help = true;
    if (code == 'i') options.inputs.emplace_back(optarg);
    if (code == 'o') options.output = optarg;
    if (code == 'k') options.top_k = parse_integer("--top-k", optarg, 0, kMax);
    if (code == 'b') options.batch_size = parse_integer("--batch-size", optarg, 1, kMax);
    if (code == 't') options.threads = parse_integer("--threads", optarg, 1, kMaxThreads);
    if (code == 'd') options.device = parse_device(optarg);
    if (code == kOps) options.ops.emplace_back(optarg);
  });
  if (help) return ShowText{kPredictHelp};
  options.model = model_argument(argc, argv);
  if (options.inputs.empty()) {
    throw InputError("weld predict needs --input; see weld predict --help");
  }
  if (options.output && options.output->extension() != ".npy") {
    throw InputError("--output takes a file that ends in .npy, got " + options.output->string());
  }
  return options;
}

}  // namespace

Command parse_command_line(int argc, char** argv) {
  if (argc < 2) throw InputError("no command was given; see weld --help");
  const std::string command = argv[1];
  if (command == "--help" || command == "-h" || command == "help") return ShowText{kHelp};
  if (command == "--version") return ShowVersion{};
  if (command == "inspect") return parse_inspect(argc - 1, argv + 1);
  if (command == "predict") return parse_predict(argc - 1, argv + 1);
  throw InputError("unknown command " + command + "; weld knows inspect and predict");
}

}  // namespace weld
