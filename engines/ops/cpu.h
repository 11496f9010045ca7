// Strided weighted pooling on the CPU.
#pragma once

#include "strided_weighted_pool.h"

#define PPLLAVA_EXPORT __attribute__((visibility("default")))

namespace ppllava {

// Instruction sets that the loop was compiled for, each a superset of the one before.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best one that this processor has. On aarch64 the baseline is NEON.
Isa best_isa();

// The pooling, cut into parts that threads may run in any order: part = window x slice of D.
class CpuPool {
 public:
  // hidden (T, h, w, width) and pooled (windows, width) of `type`, weights (T, h, w), none of which
  // is read or written before `run`. All stay the caller's.
  CpuPool(const Windows& windows, DataType type, const void* hidden, const float* weights,
          int64_t width, float temperature, void* pooled, Isa isa = best_isa());

  // Scaled: hidden (T, h, w, width), scales (T, h, w).
  CpuPool(const Windows& windows, const int8_t* hidden, const float* scales, const float* weights,
          int64_t width, float temperature, float* pooled, Isa isa = best_isa());

  int64_t num_parts() const { return windows_.num_windows() * num_slices_; }
  void run(int64_t part) const;

 private:
  template <typename T, typename Pooled = T>
  void run_as(int64_t part) const;

  Windows windows_;
  DataType type_;  // of pooled
  const void* hidden_;
  const float* scales_ = nullptr;  // where hidden is int8
  const float* weights_;
  int64_t width_;
  float temperature_;
  void* pooled_;
  Isa isa_;
  int64_t num_slices_;
  int64_t slice_;  // values in each slice but the last
};

}  // namespace ppllava

// The same for callers that speak C, on the calling thread. dtype is a DataType, size (T, h, w).
// Returns 0, or 1 when dtype or width is not one there is.
extern "C" PPLLAVA_EXPORT int strided_weighted_pool_cpu(
    int dtype, const void* hidden, const float* weights, const std::int64_t size[3],
    std::int64_t width, const std::int64_t kernel[3], const std::int64_t stride[3],
    float temperature, void* pooled);

// The scaled one, in the same way.
extern "C" PPLLAVA_EXPORT int scaled_strided_weighted_pool_cpu(
    const std::int8_t* hidden, const float* scales, const float* weights,
    const std::int64_t size[3], std::int64_t width, const std::int64_t kernel[3],
    const std::int64_t stride[3], float temperature, float* pooled);
