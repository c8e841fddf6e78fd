// Convolutions of channels_last tensors by kernels of our own: float32, and folded ones in
// bfloat16.
//
// Each algorithm is one file, conv_<algorithm>.cpp. All of them work in blocks of output pixels
// that a core's cache holds, so what follows the convolution forward (statistics, or bias, residual
// and activation) and what comes before it backward (the gradient through normalization) is done
// block by block, without another trip to memory. Blocks depend on the shape alone, never on the
// number of threads, and neither do the results.
#pragma once

#include <functional>
#include <optional>
#include <string_view>

#include "kernels/dtype.h"
#include "kernels/gemm.h"
#include "ops/aten.h"
#include "ops/cpu/block_moments.h"
#include "ops/divide.h"

namespace torchweld::ops {

using kernels::BFloat16;

struct ConvolutionShape {
  int64_t batch;
  int64_t height, width, channels;              // of the input
  int64_t out_height, out_width, out_channels;  // of the output
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups;
  kernels::DType dtype = kernels::DType::float32;  // of activations and weight

  int64_t pixels() const { return batch * out_height * out_width; }
  // Values of the weight [out_channels, kernel_height, kernel_width, channels / groups].
  int64_t weights() const {
    return out_channels * kernel_height * kernel_width * channels / groups;
  }
};

// The shape of a convolution of these tensors; of an input of this size.
ConvolutionShape to_shape(const Tensor& input, const Tensor& weight, const Convolution& conv);
ConvolutionShape to_shape(const IntList& input, const Tensor& weight, const Convolution& conv);

// One forward pass. Activations are dense [N, H, W, C] of T.
template <class T>
struct ConvolutionForwardOf {
  const T* input;
  const float* packed;  // what pack() made of the weight; or null, if packs_itself()
  const T* weight;      // [K, R, S, C / groups]; or null, if there is a packed one
  T* output;
  kernels::EpilogueOf<T> epilogue;  // its residual is laid out as the output
  BlockMoments* moments = nullptr;  // collects the statistics of a float32 output, if not null
};
using ConvolutionForward = ConvolutionForwardOf<float>;

// Writes the gradient of the convolution's output for `count` pixels from `first` on, all channels,
// densely at `rows`. Called once for every pixel, in any order, by several threads.
using GradientRows = std::function<void(int64_t first, int64_t count, float* rows)>;

struct ConvolutionBackward {
  const float* input;
  const float* weight;  // [K, R, S, C / groups]
  GradientRows grad_output;
  const float* reads[2] = {};  // tensors of the output's layout that it reads most of, or null
  float* grad_input;           // or null
  float* grad_weight;          // [K, R, S, C / groups], or null
};

class ConvolutionAlgorithm {
 public:
  virtual ~ConvolutionAlgorithm() = default;
  virtual const char* name() const = 0;

  // Whether forward() and backward() are right for the shape; not whether they are fast.
  virtual bool can_forward(const ConvolutionShape& shape) const = 0;
  virtual bool can_backward(const ConvolutionShape& shape, bool input, bool weight) const = 0;

  // Floats of a packed weight. Its layout depends on the weight alone, and dilation: neither on the
  // size of the activations nor on the instruction set, so a saved model may hold it.
  virtual int64_t packed_size(const ConvolutionShape& shape) const = 0;
  // From the weight [K, R, S, C / groups].
  virtual void pack(const ConvolutionShape& shape, const float* weight, float* packed) const = 0;
  // The same of a shape in bfloat16. Where arithmetic is float32, so is what is packed.
  virtual void pack(const ConvolutionShape& shape, const BFloat16* weight, float* packed) const;

  // Whether forward() takes a float32 weight that is not packed, and packs pieces just before their
  // use.
  virtual bool packs_itself() const { return false; }

  virtual void forward(const ConvolutionShape& shape, const ConvolutionForward& pass) const = 0;
  // The same of a shape in bfloat16: float32 inside, rounded once.
  virtual void forward(const ConvolutionShape& shape,
                       const ConvolutionForwardOf<BFloat16>& pass) const = 0;
  virtual void backward(const ConvolutionShape& shape, const ConvolutionBackward& pass) const = 0;
};

const ConvolutionAlgorithm& dense_convolution();      // groups = 1
const ConvolutionAlgorithm& winograd_convolution();   // 3x3, stride 1, groups = 1
const ConvolutionAlgorithm& depthwise_convolution();  // one channel to a group

// What pack() makes of a weight.
Tensor run_pack(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                const Tensor& weight);
// The output of forward(), for a weight that is packed, or will be where it must.
template <class T>
Tensor run_forward(const ConvolutionAlgorithm& algorithm, const ConvolutionShape& shape,
                   const Tensor& input, const Tensor& weight,
                   const std::optional<Tensor>& packed_weight,
                   const kernels::EpilogueOf<T>& epilogue, BlockMoments* moments);

// The algorithm of that name(), or null.
const ConvolutionAlgorithm* find_algorithm(std::string_view name);

}  // namespace torchweld::ops
