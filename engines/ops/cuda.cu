#include "cuda.cuh"

namespace ppllava {
namespace cuda {
namespace {

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid, along x

template <typename T>
cudaError_t launch(const Pooling& pooling, cudaStream_t stream) noexcept {
  const int64_t work = pooling.rows * num_slices<T>(pooling.width);
  if (work <= 0) {
    return cudaSuccess;
  }
  const dim3 grid(static_cast<unsigned>(work < kMaxBlocks ? work : kMaxBlocks));
  const void* const kernel = is_aligned<T>(pooling)
                                 ? reinterpret_cast<const void*>(&pool_kernel<T, true>)
                                 : reinterpret_cast<const void*>(&pool_kernel<T, false>);
  Pooling parameter = pooling;
  void* parameters[] = {&parameter};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, dim3(kThreads), parameters, 0, stream);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // it is returned; left behind, it would be taken for another's
  }
  return error;
}

}  // namespace

cudaError_t launch(DataType type, const Pooling& pooling, cudaStream_t stream) noexcept {
  switch (type) {
    case kFloat32:
      return launch<float>(pooling, stream);
    case kFloat16:
      return launch<Float16>(pooling, stream);
    case kBFloat16:
      return launch<BFloat16>(pooling, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace ppllava
