#include <ATen/ops/from_blob.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "error.h"
#include "model_runner.h"

namespace weld {
namespace {

constexpr std::pair<DType, at::ScalarType> kTypes[] = {
    {DType::bool_, at::kBool},    {DType::uint8, at::kByte},        {DType::int8, at::kChar},
    {DType::int16, at::kShort},   {DType::int32, at::kInt},         {DType::int64, at::kLong},
    {DType::float16, at::kHalf},  {DType::bfloat16, at::kBFloat16}, {DType::float32, at::kFloat},
    {DType::float64, at::kDouble}};

at::ScalarType to_torch(DType dtype) { return kTypes[static_cast<size_t>(dtype)].second; }

Array to_array(const at::Tensor& tensor) {
  const auto* type = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& pair) {
    return pair.second == tensor.scalar_type();
  });
  if (type == std::end(kTypes) || tensor.layout() != at::kStrided) {
    throw InputError("the model returns a tensor of " + std::string(toString(tensor.options())) +
                     "; weld handles dense tensors of plain numbers");
  }
  const at::Tensor dense = tensor.cpu().contiguous().resolve_neg();
  Array array(type->first, dense.sizes().vec());
  if (array.bytes() > 0) std::memcpy(array.data.get(), dense.const_data_ptr(), array.bytes());
  return array;
}

void append(std::vector<Array>& outputs, const c10::IValue& value) {
  if (value.isTensor()) {
    outputs.push_back(to_array(value.toTensor()));
  } else if (value.isTuple()) {
    for (const c10::IValue& element : value.toTupleRef().elements()) append(outputs, element);
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) outputs.push_back(to_array(tensor));
  } else {
    throw InputError("the model returns a " + value.tagKind() +
                     "; weld handles tensors and tuples of tensors");
  }
}

// TorchScript tells an error with the model's source around it; the reason is the line that says
// so.
std::string reason(std::string message) {
  constexpr std::string_view kMark = "RuntimeError: ";
  if (const size_t mark = message.rfind(kMark); mark != std::string::npos) {
    message.erase(0, mark + kMark.size());
  }
  message.erase(0, message.find_first_not_of("\n "));
  return message.substr(0, message.find('\n'));
}

template <class F>
auto in_one_line(const F& f) {
  try {
    return f();
  } catch (const InputError&) {
    throw;
  } catch (const c10::Error& error) {
    throw std::runtime_error(reason(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    throw std::runtime_error(reason(error.what()));
  }
}

void collect_operators(const torch::jit::Block& block, std::set<std::string>& schemas) {
  for (const torch::jit::Node* node : block.nodes()) {
    const c10::Symbol kind = node->kind();
    if (!kind.is_aten() && !kind.is_prim()) {
      const auto* schema = node->maybeSchema();
      schemas.insert(schema ? c10::toString(*schema) : kind.toQualString());
    }
    for (const torch::jit::Block* inner : node->blocks()) collect_operators(*inner, schemas);
  }
}

class TorchScriptRunner final : public ModelRunner {
 public:
  TorchScriptRunner(torch::jit::Module module, at::Device device)
      : module_(std::move(module)), device_(device) {
    module_.eval();
    bool optional = false;
    const auto& arguments = module_.get_method("forward").function().getSchema().arguments();
    for (size_t i = 1; i < arguments.size(); ++i) {  // 0 is self
      optional |= arguments[i].default_value().has_value();
      const bool tensor = arguments[i].type()->kind() == c10::TypeKind::TensorType;
      if (optional) break;
      if (!tensor) {
        throw InputError("input " + arguments[i].name() + " of the model is a " +
                         arguments[i].type()->str() + "; weld handles tensors");
      }
      names_.push_back(arguments[i].name());
    }
  }

  std::vector<std::string> input_names() const override { return names_; }

  std::vector<std::string> operators() const override {
    std::set<std::string> schemas;
    for (const torch::jit::Module& part : module_.modules()) {
      for (const torch::jit::Method& method : part.get_methods()) {
        const auto graph = torch::jit::toGraphFunction(method.function()).graph()->copy();
        torch::jit::Inline(*graph);
        collect_operators(*graph->block(), schemas);
      }
    }
    return {schemas.begin(), schemas.end()};
  }

  Size size() const override {
    Size size{};
    const auto add = [&](const at::Tensor& tensor) {
      ++size.tensors;
      size.elements += tensor.numel();
      size.bytes += static_cast<int64_t>(tensor.nbytes());
    };
    for (const at::Tensor& tensor : module_.parameters()) add(tensor);
    for (const at::Tensor& tensor : module_.buffers()) add(tensor);
    return size;
  }

  std::vector<Array> run(const std::vector<Array>& inputs) override {
    return in_one_line([&] {
      const c10::InferenceMode guard;
      std::vector<c10::IValue> values;
      for (const Array& input : inputs) {
        values.emplace_back(
            at::from_blob(input.data.get(), input.shape, to_torch(input.dtype)).to(device_));
      }
      std::vector<Array> outputs;
      append(outputs, module_.forward(std::move(values)));
      return outputs;
    });
  }

 private:
  torch::jit::Module module_;
  at::Device device_;
  std::vector<std::string> names_;
};

// What torch.jit.save writes: a zip archive of code and constants.
void check_archive(const std::string& path) {
  try {
    caffe2::serialize::PyTorchStreamReader archive(path);
    if (archive.hasRecord("constants.pkl")) return;
    if (archive.hasRecord("data.pkl")) {
      throw InputError(path +
                       " holds the weights of torch.save and no program; export the model "
                       "with torchweld.export");
    }
  } catch (const c10::Error&) {
    throw InputError(path + " is not a TorchScript file, or is truncated");
  }
  throw InputError(path + " is not a TorchScript file");
}

}  // namespace

std::unique_ptr<ModelRunner> load_model(const std::filesystem::path& path,
                                        const std::string& device) {
  if (!std::filesystem::is_regular_file(path)) {
    throw InputError(path.string() + (std::filesystem::exists(path) ? " is not a regular file"
                                                                    : " does not exist"));
  }
  check_archive(path.string());
  try {
    return in_one_line([&] {
      const c10::InferenceMode guard;
      const at::Device where(device);
      return std::make_unique<TorchScriptRunner>(torch::jit::load(path.string(), where), where);
    });
  } catch (const InputError&) {
    throw;
  } catch (const std::exception& error) {
    std::string why = error.what();
    if (why.starts_with("Unknown builtin op: ")) {
      if (why.ends_with('.')) why.pop_back();
      why += "; --ops LIB loads a library that registers it";
    }
    throw InputError(path.string() + " cannot be loaded: " + why);
  }
}

}  // namespace weld
