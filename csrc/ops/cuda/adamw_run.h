// One AdamW step over the tensors of a plan on CUDA. Nothing of it waits for the device.
#pragma once

#include "ops/adamw_work.h"
#include "ops/cuda/adamw_batches.h"
#include "ops/cuda/context.h"

namespace torchweld::ops {

// What a step does besides stepping; see _adamw_run in schema.cpp. Pointers are to device memory.
struct AdamWCudaOptions {
  const double* grad_scale = nullptr;
  std::optional<double> max_grad_norm = std::nullopt;
  std::optional<Tensor> loss_scale = std::nullopt;
  std::optional<Tensor> sum_of_squares = std::nullopt;
  bool skip_nonfinite = false;
  uint64_t seed = 0;
  bool statistics = false;
  double average_weight = 0;
};

// The tables of a plan, kept on the device from step to step.
//
// They are made anew for another stream, since torch's allocator takes memory to be used on the one
// it was asked for on, and for each capture of a graph: what is written in one is written when the
// graph runs. So a graph writes its tables itself in every replay, from the pointers and numbers of
// its capture.
class AdamWCudaTables : public AdamWTables {
 public:
  // On the device of a tensor.
  explicit AdamWCudaTables(const Tensor& device) : device_(device) {}

  // Brings them up to date.
  void update(const CudaContext& context, const std::vector<AdamWHyper>& groups,
              const std::vector<AdamWWork>& work);

  // Launches a step of what they hold, which is `work`; returns its report.
  Tensor step(const CudaContext& context, const AdamWCudaOptions& options, bool observe,
              std::vector<AdamWWork>& work) const;

 private:
  // What decides where everything lies in memory, and which chunks there are.
  struct Key {
    cudaStream_t stream = nullptr;
    unsigned long long capture = 0;
    size_t groups = 0;
    std::vector<kernels::cuda::AdamWKind> kinds;
    std::vector<MemoryRange> params;
    std::vector<int64_t> sizes;

    bool operator==(const Key&) const = default;
  };

  // Makes room, and cuts what is to be stepped into chunks.
  void lay_out(const CudaContext& context, const std::vector<AdamWWork>& work);

  const Tensor device_;
  Key key_;
  Words words_;  // what the device holds from groups_ on
  std::vector<kernels::cuda::ChunkRun> runs_;
  std::vector<AdamWBatch> batches_;
  CudaScratch memory_;
  int64_t groups_, grads_, tensors_, runs_at_;  // what the host writes, in this order
  int64_t chunks_, scalars_, squares_, nonfinite_, skipped_;
  int64_t elements_ = 0, chunk_size_ = 0, chunk_count_ = 0, piece_count_ = 0;
};

// Checks everything, then steps.
Tensor adamw_run_on_cuda(const char* op, AdamWPlan& plan,
                         const std::vector<AtenTensorHandle>& grads, const IntList& which,
                         const std::vector<AdamWHyper>& groups, const AdamWCudaOptions& options);

}  // namespace torchweld::ops
