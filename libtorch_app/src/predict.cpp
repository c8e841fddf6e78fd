#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <utility>

#include "commands.h"
#include "error.h"
#include "model_runner.h"
#include "npy.h"
#include "preflight.h"
#include "top_k.h"

namespace weld {
namespace {

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// Files in the order of the model's inputs. "name=file" is an input by name if the model has one of
// that name; any other argument is a file for the first input not given yet.
std::vector<std::filesystem::path> arrange(const std::vector<std::string>& arguments,
                                           const std::vector<std::string>& names) {
  std::vector<std::filesystem::path> files(names.size());
  std::vector<std::string> positional;
  for (const std::string& argument : arguments) {
    const size_t equals = argument.find('=');
    const auto name = std::find(names.begin(), names.end(), argument.substr(0, equals));
    if (equals == std::string::npos || name == names.end()) {
      positional.push_back(argument);
      continue;
    }
    auto& file = files[static_cast<size_t>(name - names.begin())];
    if (!file.empty()) throw InputError("input " + *name + " is given twice");
    file = argument.substr(equals + 1);
  }
  if (arguments.size() != names.size()) {
    throw InputError("the model takes " + std::to_string(names.size()) + " inputs (" + join(names) +
                     "), got " + std::to_string(arguments.size()));
  }
  auto next = positional.begin();
  for (auto& file : files) {
    if (file.empty()) file = *next++;
  }
  return files;
}

std::vector<Array> run_in_batches(ModelRunner& runner, const std::vector<Array>& inputs,
                                  int64_t batch_size) {
  for (const Array& input : inputs) {
    if (input.shape.empty() || input.shape[0] != inputs[0].shape[0]) {
      throw InputError("--batch-size needs inputs of equally many rows, got shapes " +
                       to_string(inputs[0].shape) + " and " + to_string(input.shape));
    }
  }
  const int64_t count = inputs[0].shape[0];
  std::vector<std::vector<Array>> parts;  // of each output, one a batch
  int64_t begin = 0;
  do {
    const int64_t end = begin + std::min(batch_size, count - begin);
    std::vector<Array> batch;
    for (const Array& input : inputs) batch.push_back(rows(input, begin, end));
    std::vector<Array> outputs = runner.run(batch);
    parts.resize(outputs.size());
    for (size_t k = 0; k < outputs.size(); ++k) {
      if (outputs[k].shape.empty() || outputs[k].shape[0] != end - begin) {
        throw InputError("output " + std::to_string(k) + " has shape " +
                         to_string(outputs[k].shape) + " for " + std::to_string(end - begin) +
                         " rows of input; run this model without --batch-size");
      }
      parts[k].push_back(std::move(outputs[k]));
    }
    begin = end;
  } while (begin < count);
  std::vector<Array> outputs;
  for (const auto& part : parts) outputs.push_back(concatenate(part));
  return outputs;
}

// Before the model runs: minutes of work should not end in a folder that is not there.
void check_writable(const std::filesystem::path& file) {
  const auto folder = std::filesystem::absolute(file).parent_path();
  if (!std::filesystem::is_directory(folder) || access(folder.c_str(), W_OK | X_OK) != 0) {
    throw InputError("--output " + file.string() + ": " + folder.string() +
                     " is no folder that can be written to");
  }
  if (std::filesystem::is_directory(file)) {
    throw InputError("--output " + file.string() + " is a directory");
  }
}

}  // namespace

int predict(const PredictOptions& options) {
  for (const auto& library : options.ops) load_operators(library);
  if (options.device != "cpu") load_cuda(options.device);
  if (options.threads) set_threads(static_cast<int>(*options.threads));
  if (options.output) check_writable(*options.output);

  check_exists(options.model);
  const std::optional<Manifest> manifest = read_manifest(options.model);
  if (manifest) {
    check_digest(options.model, *manifest);
    std::vector<Operator> operators;
    for (const std::string& schema : manifest->ops) operators.push_back(find_operator(schema));
    check_operators(operators);
  } else {
    std::cerr << "weld: note: " << options.model.string()
              << " has no manifest, its inputs are not checked\n";
  }
  const std::unique_ptr<ModelRunner> runner = load_model(options.model, options.device);
  const std::vector<std::string> names = runner->input_names();
  if (manifest) check_input_count(names.size(), *manifest);
  std::vector<Array> inputs;
  for (const auto& file : arrange(options.inputs, names)) inputs.push_back(read_npy(file));
  if (manifest) check_inputs(inputs, *manifest);

  const std::vector<Array> outputs = options.batch_size
                                         ? run_in_batches(*runner, inputs, *options.batch_size)
                                         : runner->run(inputs);
  for (size_t k = 0; k < outputs.size(); ++k) {
    const bool several = outputs.size() > 1;
    const std::string number = std::to_string(k);
    if (options.output) {
      std::filesystem::path file = *options.output;
      if (several) file.replace_extension("." + number + ".npy");
      write_npy(file, outputs[k]);
    }
    if (options.top_k > 0) {
      show_output(std::cout, several ? "output " + number : "output", outputs[k], options.top_k);
    }
  }
  return 0;
}

}  // namespace weld
