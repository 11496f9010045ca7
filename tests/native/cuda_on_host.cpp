// The CUDA kernel's own code, with CUDA's own number types, run on the host thread by thread.
#define PPLLAVA_CUDA_TYPES
#include <cstring>
#include <vector>

#include "cuda.cuh"

namespace {

using namespace ppllava;
using namespace ppllava::cuda;

// Fewer than most cases have work for, so that blocks come back for more.
constexpr int64_t kBlocksOfGrid = 5;

template <typename T>
struct HostBlock {
  bool backwards;
  Shared shared;
  Sums<T> sums[kThreads];

  template <typename Phase>
  void each(const Phase& phase) {
    for (int i = 0; i < kThreads; ++i) {
      const int thread = backwards ? kThreads - 1 - i : i;
      phase(thread, sums[thread]);
    }
  }
};

template <typename T, bool kAligned>
void run(const Pooling& pooling, bool backwards) {
  for (int64_t index = 0; index < kBlocksOfGrid; ++index) {
    HostBlock<T> block;
    block.backwards = backwards;
    pool_share_of_grid<T, kAligned>(block, pooling, index, kBlocksOfGrid);
  }
}

template <typename T>
void run(const Pooling& pooling, bool backwards) {
  is_aligned<T>(pooling) ? run<T, true>(pooling, backwards) : run<T, false>(pooling, backwards);
}

// Runs both forms of the plugin: with kernel and stride where only the device knows them, and with
// both given, the threads of a block in the other order. Returns 0, or 2 when their bits differ.
template <typename T>
int run_both(Pooling pooling, const int64_t kernel[3], const int64_t stride[3]) {
  pooling.device_kernel = kernel;
  pooling.device_stride = stride;
  run<T>(pooling, false);

  for (int axis = 0; axis < 3; ++axis) {
    pooling.kernel[axis] = kernel[axis];
    pooling.stride[axis] = stride[axis];
  }
  pooling.device_kernel = nullptr;
  pooling.device_stride = nullptr;
  const size_t size = static_cast<size_t>(pooling.rows * pooling.width) * sizeof(T);
  std::vector<Chunk<T>> memory(size / sizeof(Chunk<T>) + 2);  // aligned for chunks
  unsigned char* const again = reinterpret_cast<unsigned char*>(memory.data());
  const void* const first = pooling.pooled;
  // As far from a multiple of 16 bytes as the first, so that loads are as wide.
  pooling.pooled = again + reinterpret_cast<size_t>(first) % sizeof(Chunk<T>);
  run<T>(pooling, true);
  return size == 0 || std::memcmp(first, pooling.pooled, size) == 0 ? 0 : 2;
}

}  // namespace

// Returns 0, 1 for an unknown type, or 2 when the plugin's two forms differ. `pooled` has room for every window of size, kernel, stride.
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
  pooling.temperature = temperature;
  pooling.pooled = pooled;
  pooling.rows = Windows(size, kernel, stride).num_windows();
  switch (dtype) {
    case kFloat32:
      return run_both<float>(pooling, kernel, stride);
    case kFloat16:
      return run_both<Float16>(pooling, kernel, stride);
    case kBFloat16:
      return run_both<BFloat16>(pooling, kernel, stride);
    default:
      return 1;
  }
}
