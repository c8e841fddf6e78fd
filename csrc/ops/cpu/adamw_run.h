// One AdamW step over the tensors of a plan, and the sums it needs beforehand.
#pragma once

#include "ops/adamw_work.h"

namespace torchweld::ops {

struct AdamWOptions {
  uint64_t seed = 0;
  double average_weight = 0;
  bool statistics = false;
};

// A step between its checks and its writes.
class AdamWRun {
 public:
  // Checks everything. grads[k] is the gradient of entry which[k], or of entry k if `which` is
  // empty; they outlive the run. `op`: for messages.
  AdamWRun(const char* op, AdamWPlan& plan, const std::vector<AtenTensorHandle>& grads,
           const IntList& which);

  // Over all gradients, in an order fixed by their sizes.
  double sum_of_squares();
  int64_t count_nonfinite() const;

  // A number of elements as a share of all.
  double share(int64_t count) const;

  kernels::AdamWStatistics step(const std::vector<AdamWHyper>& groups, double grad_scale,
                                const AdamWOptions& options = {});

 private:
  // Whether two parameters do.
  bool shares_memory();

  AdamWPlan& plan_;
  std::vector<AdamWWork> work_;
};

// Sum of squares over all tensors, in an order fixed by their sizes.
double sum_of_squares(const TensorList& tensors);

}  // namespace torchweld::ops
