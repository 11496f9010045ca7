// The CUDA kernel of strided weighted pooling.
//
// A block pools one window over one slice of the width. Its work is written as phases between
// barriers, each phase the work of one thread; what runs the phases is a parameter. So the very
// same code runs on the device, where a phase ends with a barrier, and on the host, thread by
// thread, where it is tested.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <cuda_runtime_api.h>
#endif

#include "strided_weighted_pool.h"

#if defined(__CUDA_ARCH__)
#define PPLLAVA_PRAGMA(text) _Pragma(#text)
#define PPLLAVA_UNROLL(count) PPLLAVA_PRAGMA(unroll count)
#else
#define PPLLAVA_UNROLL(count)
#endif

namespace ppllava {
namespace cuda {

constexpr int kThreads = 128;       // of a block, and tokens of a tile: a thread per token
constexpr int kBlocks = 6;          // of a multiprocessor: leaves each thread 80 registers
constexpr int kLoadBytes = 16;      // the widest load of one thread
constexpr int kTokensInFlight = 4;  // loads that a thread has under way at once

// One pooling. hidden is (T, h, w, width), weights (T, h, w), pooled (rows, width).
struct Pooling {
  const void* hidden;
  const float* weights;
  int64_t size[3];
  int64_t width;
  int64_t kernel[3];
  int64_t stride[3];
  // Where only the device knows kernel and stride: three numbers each, which take the place of
  // those above. Else null.
  const int64_t* device_kernel;
  const int64_t* device_stride;
  float temperature;
  void* pooled;
  int64_t rows;
};

#if !defined(__CUDACC_RTC__)
// Puts the pooling of values of `type` on the stream and returns at once. Allocates nothing, waits
// for nothing; the error is the launch's own, also where there is no device.
cudaError_t launch(DataType type, const Pooling& pooling, cudaStream_t stream) noexcept;
#endif

template <typename T>
struct Slice {
  static constexpr int kValues = kLoadBytes / static_cast<int>(sizeof(T));  // of one thread
  static constexpr int kWidth = kThreads * kValues;                         // of one block
};

// Values of one thread: a single 16-byte load.
template <typename T>
struct alignas(kLoadBytes) Chunk {
  T values[Slice<T>::kValues];
};

// What a thread keeps in registers from phase to phase.
template <typename T>
struct Sums {
  float values[Slice<T>::kValues];
};

// What the threads of a block share.
struct Shared {
  RunningSoftmax partial[kThreads];
  float shares[kThreads];
  int64_t places[kThreads];  // where a token's row begins in hidden
};

template <typename T>
PPLLAVA_HD int64_t num_slices(int64_t width) {
  return width / Slice<T>::kWidth + (width % Slice<T>::kWidth != 0 ? 1 : 0);
}

// Whether every row can be read and written 16 bytes at a time.
template <typename T>
PPLLAVA_HD bool is_aligned(const Pooling& pooling) {
  return pooling.width % Slice<T>::kValues == 0 &&
         reinterpret_cast<unsigned long long>(pooling.hidden) % kLoadBytes == 0 &&
         reinterpret_cast<unsigned long long>(pooling.pooled) % kLoadBytes == 0;
}

PPLLAVA_HD Windows windows_of(const Pooling& pooling) {
  int64_t kernel[3];
  int64_t stride[3];
  for (int axis = 0; axis < 3; ++axis) {
    kernel[axis] =
        pooling.device_kernel == nullptr ? pooling.kernel[axis] : pooling.device_kernel[axis];
    stride[axis] =
        pooling.device_stride == nullptr ? pooling.stride[axis] : pooling.device_stride[axis];
  }
  return Windows(pooling.size, kernel, stride);
}

// Pools `window` over the columns of `slice`. `block.each(phase)` runs phase(thread, sums) for
// every thread of the block, and returns when all have finished; `block.shared` is what they share.
//
// Aligned: a thread has kValues columns next to each other. Otherwise it has every kThreads-th
// one, so that neighbouring threads still read neighbouring columns. `length` is what is left of
// the row from a thread's first column on: none, where the slice goes beyond the row.
template <typename T, bool kAligned, typename Block>
PPLLAVA_HD void pool_window(Block& block, const Pooling& pooling, const Windows& windows,
                            int64_t window, int64_t slice) {
  constexpr int kValues = Slice<T>::kValues;
  Shared& shared = block.shared;
  const int64_t first = windows.first(window);
  const int64_t num_tokens = windows.num_tokens();
  const int num_partials = num_tokens < kThreads ? static_cast<int>(num_tokens) : kThreads;

  const auto score_of = [&](int64_t token) {
    return score(pooling.weights[first + windows.offset(token)], pooling.temperature);
  };

  // The softmax's maximum and sum, once per block: a part by every thread, merged as a tree.
  block.each([&](int thread, Sums<T>& sums) {
    PPLLAVA_UNROLL(kValues)
    for (int i = 0; i < kValues; ++i) {
      sums.values[i] = 0.0f;
    }
    RunningSoftmax part;
    for (int64_t token = thread; token < num_tokens; token += kThreads) {
      part.add(score_of(token));
    }
    shared.partial[thread] = part;
  });
  for (int reach = 1; reach < num_partials; reach *= 2) {
    block.each([&](int thread, Sums<T>&) {
      if (thread % (2 * reach) == 0 && thread + reach < num_partials) {
        RunningSoftmax both = shared.partial[thread];
        both.merge(shared.partial[thread + reach]);
        shared.partial[thread] = both;
      }
    });
  }

  constexpr int kStep = kAligned ? 1 : kThreads;
  const auto column_of = [&](int thread) {
    return slice * Slice<T>::kWidth + int64_t{thread} * (kAligned ? kValues : 1);
  };

  for (int64_t begin = 0; begin < num_tokens; begin += kThreads) {
    const int64_t left = num_tokens - begin;
    const int count = left < kThreads ? static_cast<int>(left) : kThreads;

    block.each([&](int thread, Sums<T>&) {
      if (thread < count) {
        const int64_t token = begin + thread;
        shared.shares[thread] = shared.partial[0].share(score_of(token));
        shared.places[thread] = (first + windows.offset(token)) * pooling.width;
      }
    });

    block.each([&](int thread, Sums<T>& sums) {
      const T* const column = static_cast<const T*>(pooling.hidden) + column_of(thread);
      const int64_t length = pooling.width - column_of(thread);
      if (kAligned && length > 0) {
        PPLLAVA_UNROLL(kTokensInFlight)
        for (int token = 0; token < count; ++token) {
          const Chunk<T> chunk = *reinterpret_cast<const Chunk<T>*>(column + shared.places[token]);
          const float share = shared.shares[token];
          PPLLAVA_UNROLL(kValues)
          for (int i = 0; i < kValues; ++i) {
            sums.values[i] += share * to_float(chunk.values[i]);
          }
        }
      }
      if (!kAligned) {
        PPLLAVA_UNROLL(1)
        for (int token = 0; token < count; ++token) {
          const T* const values = column + shared.places[token];
          const float share = shared.shares[token];
          PPLLAVA_UNROLL(kValues)
          for (int i = 0; i < kValues; ++i) {
            if (i * kStep < length) {
              sums.values[i] += share * to_float(values[i * kStep]);
            }
          }
        }
      }
    });
  }

  block.each([&](int thread, Sums<T>& sums) {
    T* const column = static_cast<T*>(pooling.pooled) + window * pooling.width + column_of(thread);
    const int64_t length = pooling.width - column_of(thread);
    Chunk<T> chunk;
    PPLLAVA_UNROLL(kValues)
    for (int i = 0; i < kValues; ++i) {
      chunk.values[i] = from_float<T>(sums.values[i]);
    }
    if (kAligned && length > 0) {
      *reinterpret_cast<Chunk<T>*>(column) = chunk;
    }
    if (!kAligned) {
      PPLLAVA_UNROLL(kValues)
      for (int i = 0; i < kValues; ++i) {
        if (i * kStep < length) {
          column[i * kStep] = chunk.values[i];
        }
      }
    }
  });
}

// The work of block `index` of `num_blocks`: a grid of any size covers all windows.
template <typename T, bool kAligned, typename Block>
PPLLAVA_HD void pool_share_of_grid(Block& block, const Pooling& pooling, int64_t index,
                                   int64_t num_blocks) {
  const Windows windows = windows_of(pooling);
  const int64_t num_windows = windows.num_windows();
  const int64_t rows = num_windows < pooling.rows ? num_windows : pooling.rows;
  const int64_t slices = num_slices<T>(pooling.width);
  for (int64_t work = index; work < rows * slices; work += num_blocks) {
    pool_window<T, kAligned>(block, pooling, windows, work / slices, work % slices);
  }
}

#if defined(__CUDACC__)

template <typename T>
struct DeviceBlock {
  Shared& shared;
  Sums<T> sums;

  template <typename Phase>
  __device__ __forceinline__ void each(const Phase& phase) {
    phase(static_cast<int>(threadIdx.x), sums);
    __syncthreads();
  }
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks) pool_kernel(const Pooling pooling) {
  __shared__ alignas(Shared) unsigned char memory[sizeof(Shared)];
  DeviceBlock<T> block{*reinterpret_cast<Shared*>(memory), {}};
  pool_share_of_grid<T, kAligned>(block, pooling, blockIdx.x, gridDim.x);
}

#endif

}  // namespace cuda
}  // namespace ppllava
