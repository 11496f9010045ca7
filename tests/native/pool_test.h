// What the tests of strided weighted pooling share: a case, and who computes it.
#pragma once

#include <cstdint>
#include <vector>

struct Case {
  std::int32_t dtype;  // of hidden: 0 float32, 1 float16, 2 bfloat16, 3 int8 with scales
  std::int64_t size[3];
  std::int64_t width;
  std::int64_t kernel[3];
  std::int64_t stride[3];
  float temperature;
  double tolerance;  // relative to the window's sum of share * |hidden|
  std::vector<float> hidden;  // each of them a value that dtype has
  std::vector<float> weights;
  std::vector<float> scales;  // of int8
};

using PoolFunction = int(int dtype, const void* hidden, const float* weights,
                         const std::int64_t size[3], std::int64_t width,
                         const std::int64_t kernel[3], const std::int64_t stride[3],
                         float temperature, void* pooled);

using ScaledPoolFunction = int(const std::int8_t* hidden, const float* scales,
                               const float* weights, const std::int64_t size[3],
                               std::int64_t width, const std::int64_t kernel[3],
                               const std::int64_t stride[3], float temperature, float* pooled);

// Loads, creates, runs and destroys the custom op as ONNX Runtime does, on one thread.
PoolFunction pool_by_custom_op;
ScaledPoolFunction pool_by_scaled_op;

// Shapes and an ONNX Runtime that the custom op must refuse: the number of those it did not.
int count_accepted_nonsense();

extern "C" PoolFunction strided_weighted_pool_cpu;
extern "C" ScaledPoolFunction scaled_strided_weighted_pool_cpu;
#if defined(PPLLAVA_CUDA_ON_HOST)
extern "C" PoolFunction strided_weighted_pool_cuda_on_host;
#endif
