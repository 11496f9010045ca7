// The arithmetic of strided weighted pooling, once, for the CPU, CUDA and every adapter.
//
//   pooled[n, :] = sum over the tokens t of window n of share(t) * hidden[t, :]
//   shares       = softmax over the window of weights[t] / temperature, in fp32
//
// Scaled, hidden is int8 and each token's values are multiples of its scale:
//
//   pooled[n, :] = sum over the tokens t of window n of (share(t) * scale[t]) * hidden[t, :]
//
// Tokens of the grid (T, h, w), windows and the tokens inside one are numbered in (T, h, w) order.
#pragma once

#if defined(__CUDACC__) || defined(PPLLAVA_CUDA_TYPES)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#if defined(__CUDACC__)
#define PPLLAVA_HD __host__ __device__ __forceinline__
#else
#define PPLLAVA_HD inline
#endif

#if !defined(__CUDACC_RTC__)
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

namespace ppllava {

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
using int8_t = signed char;
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
#else
using std::int8_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
#endif

// ---- Windows: 64 bits, and no product or sum that can overflow, whatever kernel and stride say.

// Windows along one axis; none where the kernel does not fit, or kernel or stride is below one.
PPLLAVA_HD int64_t windows_along(int64_t size, int64_t kernel, int64_t stride) {
  return kernel < 1 || stride < 1 || kernel > size ? 0 : (size - kernel) / stride + 1;
}

struct Windows {
  int64_t size[3];    // of the grid
  int64_t kernel[3];
  int64_t stride[3];
  int64_t count[3];   // windows along each axis; all zero when there are none

  PPLLAVA_HD Windows(const int64_t* size_, const int64_t* kernel_, const int64_t* stride_) {
    bool any = true;
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = size_[axis];
      kernel[axis] = kernel_[axis];
      stride[axis] = stride_[axis];
      count[axis] = windows_along(size_[axis], kernel_[axis], stride_[axis]);
      any = any && count[axis] > 0;
    }
    for (int axis = 0; axis < 3; ++axis) {
      count[axis] = any ? count[axis] : 0;
    }
  }

  // Each window has a first token of its own, so there are no more windows than tokens.
  PPLLAVA_HD int64_t num_windows() const { return count[0] * count[1] * count[2]; }

  // Tokens in one window. Of meaning only where there are windows, like the two below.
  PPLLAVA_HD int64_t num_tokens() const { return kernel[0] * kernel[1] * kernel[2]; }

  // The grid's token that window `window` begins with.
  PPLLAVA_HD int64_t first(int64_t window) const {
    const int64_t x = window % count[2];
    const int64_t row = window / count[2];
    const int64_t y = row % count[1];
    const int64_t z = row / count[1];
    return (z * stride[0] * size[1] + y * stride[1]) * size[2] + x * stride[2];
  }

  // How many grid tokens behind the window's first one its token `token` is.
  PPLLAVA_HD int64_t offset(int64_t token) const {
    const int64_t x = token % kernel[2];
    const int64_t row = token / kernel[2];
    return (row / kernel[1] * size[1] + row % kernel[1]) * size[2] + x;
  }
};

// ---- Shares: divided, not multiplied by a reciprocal, so that every implementation rounds alike.

PPLLAVA_HD float score(float weight, float temperature) { return weight / temperature; }

PPLLAVA_HD float negative_infinity() {
#if defined(__CUDA_ARCH__)
  return __int_as_float(static_cast<int>(0xff800000u));
#else
  return -HUGE_VALF;
#endif
}

// exp(from - to), also where both are the same infinity.
PPLLAVA_HD float decay(float from, float to) { return from == to ? 1.0f : expf(from - to); }

// A softmax over scores that arrive one at a time, or in parts that are merged: first `add` or
// `merge` all of them, then ask for each score's share. Shares are normalised before they meet
// hidden values, whose sum therefore exceeds the largest of them by rounding at most. NaN and infinities come out
// as from a softmax that sees all scores at once: NaN everywhere, but for a -inf among others.
struct RunningSoftmax {
  float maximum = negative_infinity();
  float sum = 0.0f;

  PPLLAVA_HD void add(float value) {
    if (value > maximum) {
      sum = sum * decay(maximum, value) + 1.0f;
      maximum = value;
    } else if (value != negative_infinity()) {
      sum += expf(value - maximum);
    }
  }

  PPLLAVA_HD void merge(const RunningSoftmax& other) {
    const float larger = other.maximum > maximum ? other.maximum : maximum;
    sum = sum * decay(maximum, larger) + other.sum * decay(other.maximum, larger);
    maximum = larger;
  }

  PPLLAVA_HD float share(float value) const { return expf(value - maximum) / sum; }
};

// What int8 values are multiplied by: once for all values of a token.
PPLLAVA_HD float scaled_share(float share, float scale) { return share * scale; }

// ---- Types of hidden and pooled; every sum is fp32, and rounded once, to nearest even, at its end.

enum DataType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

#if defined(__CUDACC__) || defined(PPLLAVA_CUDA_TYPES)
using Float16 = __half;
using BFloat16 = __nv_bfloat16;
#else
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
#endif

PPLLAVA_HD float to_float(float value) { return value; }
PPLLAVA_HD float to_float(int8_t value) { return static_cast<float>(value); }

template <typename T>
PPLLAVA_HD T from_float(float value);

template <>
PPLLAVA_HD float from_float<float>(float value) {
  return value;
}

#if defined(__CUDACC__) || defined(PPLLAVA_CUDA_TYPES)

PPLLAVA_HD float to_float(Float16 value) { return __half2float(value); }
PPLLAVA_HD float to_float(BFloat16 value) { return __bfloat162float(value); }

template <>
PPLLAVA_HD Float16 from_float<Float16>(float value) {
  return __float2half_rn(value);
}
template <>
PPLLAVA_HD BFloat16 from_float<BFloat16>(float value) {
  return __float2bfloat16_rn(value);
}

#else

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(BFloat16 value) { return float_of_bits(uint32_t{value.bits} << 16); }

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if (value != value) {
    return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // quiet, and not rounded to infinity
  }
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float to_float(Float16 value) {
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and subnormals: units of 2^-24, exact in fp32
    const uint32_t bits = bits_of_float(static_cast<float>(magnitude) * 0x1p-24f);
    return float_of_bits(sign | bits);
  }
  const uint32_t rebias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;  // infinity and NaN
  return float_of_bits(sign | ((magnitude << 13) + rebias));
}

template <>
inline Float16 from_float<Float16>(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) {  // 2^16 and more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 leaves units of 2^-24 in the last bit.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

#endif

}  // namespace ppllava
