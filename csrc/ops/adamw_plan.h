// What the steps of an optimizer work on, kept from one step to the next.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "kernels/adamw.h"
#include "ops/adamw.h"

namespace torchweld::ops {

// What a tensor is to its parameter, in the order of the last columns of `places`.
enum AdamWRole {
  kParam,
  kStep,            // float32 scalar on the device of the parameter: steps done
  kExpAvg,          // int8 states: uint8 codes
  kExpAvgSq,        // likewise
  kMaxExpAvgSq,     // amsgrad
  kCompensation,    // kahan: bfloat16; split: int16
  kExpAvgScale,     // int8 states: float32 [ceil(elements / kAdamWBlock)]
  kExpAvgSqScale,   // likewise
  kAverage,         // of the weight; float32, float64 beside a float64 parameter
  kBFloat16Weight,  // a copy of the weight
  kRoleCount,
};

constexpr bool has_shape_of_param(int role) {
  return role != kStep && role != kExpAvgScale && role != kExpAvgSqScale;
}

// A parameter and its states.
struct AdamWEntry {
  AdamWEntry() { tensors.fill(-1); }

  int64_t group = 0;
  int64_t id = 0;  // what the random bits of two parameters differ by
  kernels::AdamWState state = kernels::AdamWState::like_param;
  kernels::AdamWRounding rounding = kernels::AdamWRounding::nearest;
  // Element i of the parameter is element offset + i / row * stride + i % row of the whole it is a
  // shard of; row = 0: element offset + i.
  int64_t offset = 0, row = 0, stride = 0;
  std::array<int64_t, kRoleCount> tensors;  // into AdamWPlan::tensors; -1 where there is none

  // What the last full check found, which holds while the tensors keep their dtypes, sizes and
  // strides.
  bool uniform = false;  // all tensors lie as the parameter does, without gaps
  int32_t device_type = -1, device_index = -1;
  std::array<int32_t, kRoleCount> dtypes{};
  const std::vector<int64_t>* layout = nullptr;  // sizes, then strides; one of AdamWPlan::layouts
  RealType type{};
  int64_t size = 0;  // of type.dtype

  // Where the tensors were at the last look.
  std::array<void*, kRoleCount> data{};
};

// What a back end keeps with a plan.
struct AdamWTables {
  virtual ~AdamWTables() = default;
};

// Holds tensors, and pointers into them for the length of a step: `p.data = x` changes what a
// tensor holds, and the next step is to see it.
struct AdamWPlan {
  AdamWPlan() = default;
  AdamWPlan(TensorList all, const Tensor& places);
  AdamWPlan(const AdamWPlan&) = delete;
  AdamWPlan& operator=(const AdamWPlan&) = delete;

  const Tensor* find(const AdamWEntry& entry, int role) const {
    return entry.tensors[role] < 0 ? nullptr : &tensors[static_cast<size_t>(entry.tensors[role])];
  }
  const Tensor& get(const AdamWEntry& entry, int role) const { return *find(entry, role); }

  const AdamWPlan* self = this;  // tells a plan from other bytes
  TensorList tensors;
  std::vector<AdamWEntry> entries;
  std::set<std::vector<int64_t>> layouts;
  // Where parameters lay that were found not to overlap.
  std::vector<MemoryRange> disjoint;
  std::unique_ptr<AdamWTables> tables;
};

// A plan as an operator returns it: bytes of its own that free it. No operator may copy them.
Tensor to_tensor(std::unique_ptr<AdamWPlan> plan);
AdamWPlan& to_plan(const Tensor& tensor);

// Checks an entry and its gradient against each other and notes in the entry what it found. `op`
// and `k`: for messages.
void check(const char* op, AdamWPlan& plan, AdamWEntry& entry, const Tensor& grad, size_t k);

// Whether the entry is uniform, and it and the gradient are as they were when that was found; then
// notes where they are. Throws nothing.
bool still_uniform(const AdamWPlan& plan, AdamWEntry& entry, AtenTensorHandle grad,
                   const void** grad_data);

}  // namespace torchweld::ops
