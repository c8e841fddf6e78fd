#include "ops/adamw_plan.h"

#include <algorithm>

#include "ops/check.h"

namespace torchweld::ops {
namespace {

using kernels::AdamWRounding;
using kernels::AdamWState;

constexpr const char* kRoleNames[] = {
    "params",        "state_steps",    "exp_avgs",          "exp_avg_sqs", "max_exp_avg_sqs",
    "compensations", "exp_avg_scales", "exp_avg_sq_scales", "averages",    "bfloat16_weights"};
static_assert(std::size(kRoleNames) == kRoleCount);

constexpr int kColumns = 7 + kRoleCount;

int32_t raw_dtype(const Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

ScalarType state_dtype(const AdamWEntry& entry, ScalarType param) {
  if (entry.state == AdamWState::int8) return ScalarType::Byte;
  const bool as_param =
      entry.state == AdamWState::like_param && entry.rounding == AdamWRounding::nearest;
  return as_param ? param : ScalarType::BFloat16;
}

ScalarType expected_dtype(const AdamWEntry& entry, int role, ScalarType param) {
  switch (role) {
    case kParam:
      return param;
    case kCompensation:
      return entry.rounding == AdamWRounding::kahan ? ScalarType::BFloat16 : ScalarType::Short;
    case kAverage:
      if (param == ScalarType::Double || param == ScalarType::ComplexDouble ||
          param == ScalarType::ComplexFloat) {
        return param;
      }
      return ScalarType::Float;
    case kBFloat16Weight:
      return ScalarType::BFloat16;
    case kStep:
    case kExpAvgScale:
    case kExpAvgSqScale:
      return ScalarType::Float;
    default:
      return state_dtype(entry, param);
  }
}

// Asked of torch with as few calls as there are: of a thousand small tensors they are what a step
// costs. Each is false where torch reports an error.
bool has_dtype(AtenTensorHandle tensor, int32_t dtype) {
  int32_t found;
  return aoti_torch_get_dtype(tensor, &found) == AOTI_TORCH_SUCCESS && found == dtype;
}

bool has_layout(AtenTensorHandle tensor, const std::vector<int64_t>& layout) {
  int64_t dims, *sizes, *strides;
  if (aoti_torch_get_dim(tensor, &dims) != AOTI_TORCH_SUCCESS ||
      2 * static_cast<size_t>(dims) != layout.size() ||
      aoti_torch_get_sizes(tensor, &sizes) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_strides(tensor, &strides) != AOTI_TORCH_SUCCESS) {
    return false;
  }
  return std::equal(sizes, sizes + dims, layout.begin()) &&
         std::equal(strides, strides + dims, layout.begin() + dims);
}

// Whether it is where the entry was found to be.
bool is_there(AtenTensorHandle tensor, const AdamWEntry& entry) {
  int32_t type, index;
  return aoti_torch_get_device_type(tensor, &type) == AOTI_TORCH_SUCCESS &&
         type == entry.device_type &&
         (type == aoti_torch_device_type_cpu() ||
          (aoti_torch_get_device_index(tensor, &index) == AOTI_TORCH_SUCCESS &&
           index == entry.device_index));
}

bool is_step(AtenTensorHandle tensor) {
  int64_t size;
  return aoti_torch_get_numel(tensor, &size) == AOTI_TORCH_SUCCESS && size == 1;
}

void check_present(const char* op, const AdamWPlan& plan, const AdamWEntry& entry, int role,
                   bool needed) {
  TORCHWELD_CHECK((plan.find(entry, role) != nullptr) == needed, op, kRoleNames[role],
                  (needed ? "a tensor" : "none") << " with this state and rounding",
                  (needed ? "none" : "one"));
}

int64_t blocks_of(const AdamWEntry& entry) {
  return (entry.size + kernels::kAdamWBlock - 1) / kernels::kAdamWBlock;
}

bool is_scale(AtenTensorHandle tensor, const AdamWEntry& entry) {
  int64_t size;
  bool contiguous;
  return aoti_torch_get_numel(tensor, &size) == AOTI_TORCH_SUCCESS && size == blocks_of(entry) &&
         aoti_torch_is_contiguous(tensor, &contiguous) == AOTI_TORCH_SUCCESS && contiguous;
}

void check_scale(const char* op, const AdamWPlan& plan, const AdamWEntry& entry, int role) {
  const Tensor& scale = plan.get(entry, role);
  TORCHWELD_CHECK(
      is_scale(scale.get(), entry), op, kRoleNames[role],
      "shape [" << blocks_of(entry) << "], one per " << kernels::kAdamWBlock << " elements",
      shape_string(scale));
}

}  // namespace

AdamWPlan::AdamWPlan(TensorList all, const Tensor& places) : tensors(std::move(all)) {
  constexpr const char* op = "_adamw_plan";
  TORCHWELD_CHECK(places.scalar_type() == ScalarType::Long && places.dim() == 2 &&
                      places.size(1) == kColumns && places.is_contiguous() && places.is_cpu(),
                  op, "places", "int64 [n, " << kColumns << "]", shape_string(places));
  const int64_t* row = places.const_data_ptr<int64_t>();
  const auto count = static_cast<int64_t>(tensors.size());
  for (int64_t k = 0; k < places.size(0); ++k, row += kColumns) {
    AdamWEntry& entry = entries.emplace_back();
    TORCHWELD_CHECK(row[2] >= 0 && row[2] < static_cast<int64_t>(kernels::kAdamWStateCount) &&
                        row[3] >= 0 && row[3] < static_cast<int64_t>(kernels::kAdamWRoundingCount),
                    op, "places", "a state and a rounding", row[2] << " and " << row[3]);
    entry.group = row[0];
    entry.id = row[1];
    entry.state = static_cast<AdamWState>(row[2]);
    entry.rounding = static_cast<AdamWRounding>(row[3]);
    entry.offset = row[4];
    entry.row = row[5];
    entry.stride = row[6];
    for (int role = 0; role < kRoleCount; ++role) {
      const int64_t place = row[7 + role];
      const bool needed = role <= kExpAvgSq;
      TORCHWELD_CHECK(place < count && place >= (needed ? 0 : -1), op, "places",
                      "a place in tensors", place);
      entry.tensors[role] = place;
    }
  }
}

Tensor to_tensor(std::unique_ptr<AdamWPlan> plan) {
  const IntList sizes{static_cast<int64_t>(sizeof(AdamWPlan))}, strides{1};
  Tensor bytes = torch::stable::from_blob(
      plan.get(), sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
      ScalarType::Byte, [](void* data) { delete static_cast<AdamWPlan*>(data); });
  plan.release();
  return bytes;
}

AdamWPlan& to_plan(const Tensor& tensor) {
  AdamWPlan* plan = nullptr;
  if (tensor.scalar_type() == ScalarType::Byte && tensor.numel() == sizeof(AdamWPlan)) {
    plan = static_cast<AdamWPlan*>(tensor.mutable_data_ptr());
  }
  TORCHWELD_CHECK(plan != nullptr && plan->self == plan, "_adamw_run", "plan",
                  "what _adamw_plan returned", shape_string(tensor));
  return *plan;
}

void check(const char* op, AdamWPlan& plan, AdamWEntry& entry, const Tensor& grad, size_t k) {
  const Tensor& param = plan.get(entry, kParam);
  const ScalarType type = param.scalar_type();
  const auto real = real_type(type);
  TORCHWELD_CHECK(real, op, "params", kAdamWDTypes, dtype_name(type));
  entry.type = *real;
  entry.size = param.numel() * real->per_element;
  check_like_param(op, "grads", grad, param, type, k, false);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(param.get(), &entry.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(param.get(), &entry.device_index));
  entry.uniform = false;  // until all checks have passed
  bool uniform = is_dense(param);
  const bool int8 = entry.state == AdamWState::int8;
  check_present(op, plan, entry, kExpAvgScale, int8);
  check_present(op, plan, entry, kExpAvgSqScale, int8);
  if (int8) check_present(op, plan, entry, kMaxExpAvgSq, false);
  check_present(op, plan, entry, kCompensation,
                entry.rounding == AdamWRounding::kahan || entry.rounding == AdamWRounding::split);
  for (int role = 0; role < kRoleCount; ++role) {
    const Tensor* tensor = plan.find(entry, role);
    if (tensor == nullptr) continue;
    const ScalarType expected = expected_dtype(entry, role, type);
    entry.dtypes[role] = raw_dtype(*tensor);
    if (has_shape_of_param(role)) {
      check_like_param(op, kRoleNames[role], *tensor, param, expected, k, true);
      uniform = uniform && same_layout(*tensor, param);
    } else {
      TORCHWELD_CHECK(
          tensor->device() == param.device() && tensor->scalar_type() == expected &&
              (role != kStep || tensor->numel() == 1),
          op, kRoleNames[role],
          "float32 " << (role == kStep ? "scalars" : "vectors") << " on the device of params",
          dtype_name(tensor->scalar_type()) << " of shape " << shape_string(*tensor));
    }
  }
  if (int8) {
    check_scale(op, plan, entry, kExpAvgScale);
    check_scale(op, plan, entry, kExpAvgSqScale);
  }
  const auto sizes = param.sizes(), strides = param.strides();
  std::vector<int64_t> layout(sizes.begin(), sizes.end());
  layout.insert(layout.end(), strides.begin(), strides.end());
  entry.layout = &*plan.layouts.insert(std::move(layout)).first;
  entry.data.fill(nullptr);
  entry.uniform = uniform;
}

bool still_uniform(const AdamWPlan& plan, AdamWEntry& entry, AtenTensorHandle grad,
                   const void** grad_data) {
  if (!entry.uniform || !has_dtype(grad, entry.dtypes[kParam]) ||
      !has_layout(grad, *entry.layout) || !is_there(grad, entry) ||
      torch_get_const_data_ptr(grad, grad_data) != AOTI_TORCH_SUCCESS) {
    return false;
  }
  for (int role = 0; role < kRoleCount; ++role) {
    if (entry.tensors[role] < 0) continue;
    const AtenTensorHandle tensor = plan.get(entry, role).get();
    const bool as_before = has_dtype(tensor, entry.dtypes[role]) &&
                           (has_shape_of_param(role) ? has_layout(tensor, *entry.layout)
                            : role == kStep          ? is_step(tensor)
                                                     : is_scale(tensor, entry));
    void* data;
    if (!as_before || torch_get_mutable_data_ptr(tensor, &data) != AOTI_TORCH_SUCCESS) return false;
    // What is where it was is on the device it was on.
    if ((data == nullptr || data != entry.data[role]) && !is_there(tensor, entry)) return false;
    entry.data[role] = data;
  }
  return true;
}

}  // namespace torchweld::ops
