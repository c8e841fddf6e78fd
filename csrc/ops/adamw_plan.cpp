#include "ops/adamw_plan.h"

#include <algorithm>
#include <cstring>

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

bool same(const Tensor& tensor, int32_t dtype, const std::vector<int64_t>& layout) {
  if (raw_dtype(tensor) != dtype || !tensor.is_cpu()) return false;
  const auto sizes = tensor.sizes();
  const size_t dims = sizes.size();
  return layout.size() == 2 * dims &&
         std::memcmp(sizes.data(), layout.data(), dims * sizeof(int64_t)) == 0 &&
         std::memcmp(tensor.strides().data(), layout.data() + dims, dims * sizeof(int64_t)) == 0;
}

bool is_step(const Tensor& tensor, int32_t dtype) {
  return raw_dtype(tensor) == dtype && tensor.dim() == 0 && tensor.is_cpu();
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

bool is_scale(const Tensor& tensor, const AdamWEntry& entry, int32_t dtype) {
  return raw_dtype(tensor) == dtype && tensor.numel() == blocks_of(entry) &&
         tensor.is_contiguous() && tensor.is_cpu();
}

void check_scale(const char* op, const AdamWPlan& plan, const AdamWEntry& entry, int role) {
  const Tensor& scale = plan.get(entry, role);
  TORCHWELD_CHECK(
      is_scale(scale, entry, entry.dtypes[role]), op, kRoleNames[role],
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

void check(const char* op, const AdamWPlan& plan, AdamWEntry& entry, const Tensor& grad, size_t k) {
  const Tensor& param = plan.get(entry, kParam);
  const ScalarType type = param.scalar_type();
  const auto real = real_type(type);
  TORCHWELD_CHECK(real, op, "params", kAdamWDTypes, dtype_name(type));
  entry.type = *real;
  entry.size = param.numel() * real->per_element;
  check_like_param(op, "grads", grad, param, type, k, false);
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
      TORCHWELD_CHECK(tensor->is_cpu() && tensor->scalar_type() == expected &&
                          (role != kStep || tensor->numel() == 1),
                      op, kRoleNames[role], "float32 " << (role == kStep ? "scalars" : "vectors"),
                      dtype_name(tensor->scalar_type()) << " of shape " << shape_string(*tensor));
    }
  }
  if (int8) {
    check_scale(op, plan, entry, kExpAvgScale);
    check_scale(op, plan, entry, kExpAvgSqScale);
  }
  const auto sizes = param.sizes(), strides = param.strides();
  entry.layout.assign(sizes.begin(), sizes.end());
  entry.layout.insert(entry.layout.end(), strides.begin(), strides.end());
  entry.uniform = uniform;
}

bool still_uniform(const AdamWPlan& plan, const AdamWEntry& entry, const Tensor& grad) {
  if (!entry.uniform || !same(grad, entry.dtypes[kParam], entry.layout)) return false;
  for (int role = 0; role < kRoleCount; ++role) {
    const Tensor* tensor = plan.find(entry, role);
    if (tensor == nullptr) continue;
    const int32_t dtype = entry.dtypes[role];
    const bool as_before = has_shape_of_param(role) ? same(*tensor, dtype, entry.layout)
                           : role == kStep          ? is_step(*tensor, dtype)
                                                    : is_scale(*tensor, entry, dtype);
    if (!as_before) return false;
  }
  return true;
}

}  // namespace torchweld::ops
