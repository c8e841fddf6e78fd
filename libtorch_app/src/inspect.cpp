#include <torchweld/torchweld.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iomanip>
#include <iostream>
#include <sstream>

#include "commands.h"
#include "error.h"
#include "model_runner.h"
#include "preflight.h"

namespace weld {
namespace {

std::ostream& line(const char* title) { return std::cout << std::left << std::setw(14) << title; }

// "1.2 MiB (1234567 bytes)"
std::string human_size(uint64_t bytes) {
  constexpr const char* kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) value /= 1024, ++unit;
  std::ostringstream text;
  if (unit == 0) {
    text << bytes << " bytes";
  } else {
    text << std::fixed << std::setprecision(1) << value << ' ' << kUnits[unit] << " (" << bytes
         << " bytes)";
  }
  return text.str();
}

void show_signature(const char* title, const std::vector<TensorSpec>& specs) {
  for (const TensorSpec& spec : specs) {
    line(title) << spec.name << ": " << to_string(spec) << '\n';
    title = "";
  }
}

void show_operators(const std::vector<Operator>& operators) {
  const char* title = "operators";
  if (operators.empty()) line(title) << "torch's own only\n";
  for (const Operator& op : operators) {
    line(title) << op.expected << '\n';
    title = "";
    if (op.usable) {
      line("") << "  registered here\n";
    } else if (op.registered) {
      line("") << "  REGISTERED HERE AS " << *op.registered << '\n';
    } else {
      line("") << "  NOT REGISTERED HERE\n";
    }
  }
}

// How the model's outputs on this machine compare with those of the machine it was exported on.
std::string compare(const std::vector<Array>& got, const std::vector<Array>& expected) {
  double largest = 0;
  bool same = got.size() == expected.size();
  for (size_t k = 0; same && k < got.size(); ++k) {
    if (got[k].dtype != expected[k].dtype || got[k].shape != expected[k].shape) {
      return "NOT REPRODUCED: output " + std::to_string(k) + " is " + name(got[k].dtype) + " " +
             to_string(got[k].shape) + ", expected " + name(expected[k].dtype) + " " +
             to_string(expected[k].shape);
    }
    if (std::memcmp(got[k].data.get(), expected[k].data.get(), got[k].bytes()) == 0) continue;
    for (int64_t i = 0; i < got[k].numel(); ++i) {
      const double a = element(got[k], i);
      const double b = element(expected[k], i);
      if (a == b || (std::isnan(a) && std::isnan(b))) continue;
      const double difference = std::abs(a - b);
      largest = std::isnan(difference) ? HUGE_VAL : std::max(largest, difference);
    }
  }
  if (!same) return "NOT REPRODUCED: a different number of outputs";
  if (largest == 0) return "reproduced bit for bit";
  std::ostringstream text;
  text << "reproduced up to a difference of " << largest;
  return text.str();
}

}  // namespace

int inspect(const InspectOptions& options) {
  for (const auto& library : options.ops) load_operators(library);
  check_exists(options.model);
  const std::optional<Manifest> manifest = read_manifest(options.model);
  if (manifest) check_digest(options.model, *manifest);

  line("model") << options.model.string() << '\n';
  line("size") << human_size(std::filesystem::file_size(options.model)) << '\n';
  if (manifest) {
    line("manifest") << manifest->path.string() << ", SHA-256 as declared\n";
    line("exported by") << "torch " << manifest->torch_version << ", torchweld "
                        << manifest->torchweld_version << '\n';
  } else {
    line("manifest") << "none: dtypes and shapes are unknown\n";
  }
  line("running on") << "torch " << torch_version() << " (" << torch_cpu_capability()
                     << "), torchweld " << torchweld::version() << " ("
                     << torchweld::cpu_capability() << "), threads " << threads() << '\n';
  std::vector<Operator> operators;
  if (manifest) {
    show_signature("inputs", manifest->inputs);
    show_signature("outputs", manifest->outputs);
    for (const std::string& schema : manifest->ops) operators.push_back(find_operator(schema));
    show_operators(operators);
  }
  std::cout.flush();
  check_operators(operators);

  const std::unique_ptr<ModelRunner> runner = load_model(options.model);
  if (manifest) {
    check_input_count(runner->input_names().size(), *manifest);
  } else {
    const char* title = "inputs";
    for (const std::string& name : runner->input_names()) {
      line(title) << name << '\n';
      title = "";
    }
    for (const std::string& schema : runner->operators())
      operators.push_back(find_operator(schema));
    show_operators(operators);
  }
  const ModelRunner::Size size = runner->size();
  line("parameters") << size.elements << " in " << size.tensors << " tensors, "
                     << human_size(static_cast<uint64_t>(size.bytes)) << '\n';
  if (manifest) {
    line("golden sample") << std::flush
                          << compare(runner->run(manifest->golden_inputs), manifest->golden_outputs)
                          << '\n';
  }
  return 0;
}

}  // namespace weld
