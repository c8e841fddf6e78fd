#include "ops/cuda/context.h"

#include <dlfcn.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace torchweld::ops {
namespace {

std::string version_string(int version) {  // 13020: 13.2
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Kernels have parameters of more than 4 KB (launch_write).
constexpr int kOldestDriver = 12010;

// Empty, or why the driver cannot run this build. A driver runs the machine code of all releases of
// CUDA with its own major number and the older ones; of PTX, see CudaContext::check().
std::string driver_problem() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  const int oldest = std::max(runtime / 1000 * 1000, kOldestDriver);
  if (driver >= oldest) return {};
  std::ostringstream out;
  out << "this build needs a driver for CUDA " << version_string(oldest) << ", ";
  if (driver == 0) {
    out << "and there is none";
  } else {
    out << "got one for CUDA " << version_string(driver);
  }
  out << ". Update the driver, or build torchweld with an older CUDA; operators on the CPU work";
  return out.str();
}

// Of libtorch_cuda.so, which is loaded where there are tensors on CUDA. Linking to it would need
// torch's CUDA wheel to build with.
cudaStream_t current_stream(int device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(symbol);
  }();
  if (get == nullptr) throw std::runtime_error("torchweld: torch's CUDA library is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

int32_t cuda_device(const char* op, const Tensor& tensor) {
  if (!tensor.is_cuda()) {
    throw std::runtime_error("torchweld::" + std::string(op) +
                             ": expected all tensors on one CUDA device, got one elsewhere");
  }
  return tensor.get_device_index();
}

}  // namespace

CudaContext::CudaContext(const char* op, const Tensor& tensor)
    : op_(op), guard_(cuda_device(op, tensor)), device_(tensor.get_device_index()) {
  static const std::string problem = driver_problem();
  if (!problem.empty()) {
    throw std::runtime_error("torchweld::" + std::string(op) + ": " + problem);
  }
  stream_ = current_stream(device_);
}

int CudaContext::multiprocessors() const {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
  return count;
}

int CudaContext::capability() const {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_));
  return 10 * major + minor;
}

unsigned long long CudaContext::capture() const {
  cudaStreamCaptureStatus status;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(stream_, &status, &id));
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void CudaContext::check(cudaError_t error) const {
  if (error == cudaSuccess) return;
  std::ostringstream out;
  out << "torchweld::" << op_ << ": CUDA: " << cudaGetErrorString(error) << " ("
      << cudaGetErrorName(error) << ", device " << device_ << ")";
  if (error == cudaErrorUnsupportedPtxVersion) {
    // Of an architecture without machine code in this build: then the minor number counts too.
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    out << ". On this GPU, this build needs a driver for CUDA " << version_string(runtime)
        << ", got one for CUDA " << version_string(driver);
  }
  throw std::runtime_error(out.str());
}

}  // namespace torchweld::ops
