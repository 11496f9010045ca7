// The CUDA kernel's own code, with CUDA's own number types, run on the host thread by thread.
#define PPLLAVA_CUDA_TYPES
#include "cuda.cuh"

namespace {

using namespace ppllava;
using namespace ppllava::cuda;

// Fewer than most cases have work for, so that blocks come back for more.
constexpr int64_t kBlocksOfGrid = 5;

template <typename T>
struct HostBlock {
  Shared shared;
  Sums<T> sums[kThreads];

  template <typename Phase>
  void each(const Phase& phase) {
    for (int thread = 0; thread < kThreads; ++thread) {
      phase(thread, sums[thread]);
    }
  }
};

template <typename T, bool kAligned>
void run(const Pooling& pooling) {
  for (int64_t index = 0; index < kBlocksOfGrid; ++index) {
    HostBlock<T> block;
    pool_share_of_grid<T, kAligned>(block, pooling, index, kBlocksOfGrid);
  }
}

template <typename T>
void run(const Pooling& pooling) {
  is_aligned<T>(pooling) ? run<T, true>(pooling) : run<T, false>(pooling);
}

}  // namespace

// Returns 0, or 1 for an unknown type. `pooled` has room for every window of size, kernel, stride.
extern "C" __attribute__((visibility("default"))) int strided_weighted_pool_cuda_on_host(
    int dtype, const void* hidden, const float* weights, const int64_t size[3], int64_t width,
    const int64_t kernel[3], const int64_t stride[3], float temperature, void* pooled) {
  Pooling pooling = {};
  pooling.hidden = hidden;
  pooling.weights = weights;
  pooling.width = width;
  for (int axis = 0; axis < 3; ++axis) {
    pooling.size[axis] = size[axis];
  }
  // As a TensorRT plugin with kernel and stride as inputs passes them.
  pooling.device_kernel = kernel;
  pooling.device_stride = stride;
  pooling.temperature = temperature;
  pooling.pooled = pooled;
  pooling.rows = Windows(size, kernel, stride).num_windows();
  switch (dtype) {
    case kFloat32:
      run<float>(pooling);
      return 0;
    case kFloat16:
      run<Float16>(pooling);
      return 0;
    case kBFloat16:
      run<BFloat16>(pooling);
      return 0;
    default:
      return 1;
  }
}
