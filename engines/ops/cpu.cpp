#include "cpu.h"

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// What differs between instruction sets is written as plain loops, inlined into one function for
// each set, where the compiler vectorises them; only float16 and int8 on x86 need more than that.
#define PPLLAVA_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__)
#define PPLLAVA_AVX2 __attribute__((target("avx2,fma,f16c")))
#define PPLLAVA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#endif

namespace ppllava {
namespace {

// Tokens whose rows are read side by side: each adds to every sum once they are all loaded, so that
// sums are loaded and stored once for several rows, and memory is busy with several streams.
constexpr int kRows = 4;
// Sums of one part: they stay in the first-level cache, and on the stack.
constexpr int64_t kMaxSlice = 4096;
// Fewer parts than this are too coarse to be shared evenly by threads.
constexpr int64_t kEnoughParts = 64;
constexpr int64_t kMinSlice = 256;

#if defined(__aarch64__)
PPLLAVA_INLINE float widen(const Float16& value) {
  __fp16 half;
  std::memcpy(&half, &value, sizeof half);
  return half;
}
PPLLAVA_INLINE void narrow(float value, Float16& into) {
  const __fp16 half = static_cast<__fp16>(value);
  std::memcpy(&into, &half, sizeof into);
}
#else
PPLLAVA_INLINE float widen(const Float16& value) { return to_float(value); }
PPLLAVA_INLINE void narrow(float value, Float16& into) { into = from_float<Float16>(value); }
#endif
PPLLAVA_INLINE float widen(float value) { return value; }
PPLLAVA_INLINE float widen(BFloat16 value) { return to_float(value); }
PPLLAVA_INLINE float widen(int8_t value) { return to_float(value); }
PPLLAVA_INLINE void narrow(float value, float& into) { into = value; }
PPLLAVA_INLINE void narrow(float value, BFloat16& into) { into = from_float<BFloat16>(value); }

// sums[d] += sum over the first `rows` rows of shares[row] * row[d], for d from `begin` on.
template <typename T>
PPLLAVA_INLINE void add_rows(float* __restrict sums, const T* const* rows, const float* shares,
                             int num_rows, int64_t begin, int64_t width) {
  if (num_rows == kRows) {
    const T* __restrict a = rows[0];
    const T* __restrict b = rows[1];
    const T* __restrict c = rows[2];
    const T* __restrict e = rows[3];
    const float s = shares[0], t = shares[1], u = shares[2], v = shares[3];
    for (int64_t d = begin; d < width; ++d) {
      sums[d] += (s * widen(a[d]) + t * widen(b[d])) + (u * widen(c[d]) + v * widen(e[d]));
    }
    return;
  }
  for (int row = 0; row < num_rows; ++row) {
    const T* __restrict a = rows[row];
    const float s = shares[row];
    for (int64_t d = begin; d < width; ++d) {
      sums[d] += s * widen(a[d]);
    }
  }
}

template <typename T>
PPLLAVA_INLINE void store_row(const float* __restrict sums, T* __restrict into, int64_t begin,
                              int64_t width) {
  for (int64_t d = begin; d < width; ++d) {
    narrow(sums[d], into[d]);
  }
}

struct Baseline {
  template <typename T>
  static void add(float* sums, const T* const* rows, const float* shares, int num_rows,
                  int64_t width) {
    add_rows(sums, rows, shares, num_rows, 0, width);
  }
  template <typename T>
  static void store(const float* sums, T* into, int64_t width) {
    store_row(sums, into, 0, width);
  }
};

#if defined(__x86_64__)
struct Avx2 {
  template <typename T>
  PPLLAVA_AVX2 static void add(float* sums, const T* const* rows, const float* shares, int num_rows,
                               int64_t width) {
    add_rows(sums, rows, shares, num_rows, 0, width);
  }
  template <typename T>
  PPLLAVA_AVX2 static void store(const float* sums, T* into, int64_t width) {
    store_row(sums, into, 0, width);
  }

  PPLLAVA_AVX2 static __m256 load(const Float16* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  PPLLAVA_AVX2 static __m256 load(const int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  template <typename T>
  PPLLAVA_AVX2 static void add_loaded(float* sums, const T* const* rows, const float* shares,
                                      int num_rows, int64_t width) {
    int64_t d = 0;
    if (num_rows == kRows) {
      const T *a = rows[0], *b = rows[1], *c = rows[2], *e = rows[3];
      const __m256 s = _mm256_set1_ps(shares[0]), t = _mm256_set1_ps(shares[1]);
      const __m256 u = _mm256_set1_ps(shares[2]), v = _mm256_set1_ps(shares[3]);
      for (; d + 8 <= width; d += 8) {
        const __m256 first = _mm256_fmadd_ps(s, load(a + d), _mm256_mul_ps(t, load(b + d)));
        const __m256 last = _mm256_fmadd_ps(u, load(c + d), _mm256_mul_ps(v, load(e + d)));
        const __m256 sum = _mm256_add_ps(_mm256_loadu_ps(sums + d), _mm256_add_ps(first, last));
        _mm256_storeu_ps(sums + d, sum);
      }
    } else {
      const int64_t whole = width - width % 8;
      for (int row = 0; row < num_rows; ++row) {
        const __m256 s = _mm256_set1_ps(shares[row]);
        for (d = 0; d < whole; d += 8) {
          const __m256 sum = _mm256_loadu_ps(sums + d);
          _mm256_storeu_ps(sums + d, _mm256_fmadd_ps(s, load(rows[row] + d), sum));
        }
      }
    }
    add_rows(sums, rows, shares, num_rows, d, width);
  }
  static void add(float* sums, const Float16* const* rows, const float* shares, int num_rows,
                  int64_t width) {
    add_loaded(sums, rows, shares, num_rows, width);
  }
  static void add(float* sums, const int8_t* const* rows, const float* shares, int num_rows,
                  int64_t width) {
    add_loaded(sums, rows, shares, num_rows, width);
  }
  PPLLAVA_AVX2 static void store(const float* sums, Float16* into, int64_t width) {
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(into + d),
                       _mm256_cvtps_ph(_mm256_loadu_ps(sums + d), _MM_FROUND_TO_NEAREST_INT));
    }
    store_row(sums, into, d, width);
  }
};

struct Avx512 {
  template <typename T>
  PPLLAVA_AVX512 static void add(float* sums, const T* const* rows, const float* shares,
                                 int num_rows, int64_t width) {
    add_rows(sums, rows, shares, num_rows, 0, width);
  }
  template <typename T>
  PPLLAVA_AVX512 static void store(const float* sums, T* into, int64_t width) {
    store_row(sums, into, 0, width);
  }
  static void add(float* sums, const Float16* const* rows, const float* shares, int num_rows,
                  int64_t width) {
    Avx2::add(sums, rows, shares, num_rows, width);
  }
  static void add(float* sums, const int8_t* const* rows, const float* shares, int num_rows,
                  int64_t width) {
    Avx2::add(sums, rows, shares, num_rows, width);
  }
  static void store(const float* sums, Float16* into, int64_t width) {
    Avx2::store(sums, into, width);
  }
};
#endif

// Calls `with(token)` for each token of the window that begins at grid token `first`.
template <typename F>
PPLLAVA_INLINE void for_each_token(const Windows& windows, int64_t first, F with) {
  for (int64_t z = 0; z < windows.kernel[0]; ++z) {
    for (int64_t y = 0; y < windows.kernel[1]; ++y) {
      const int64_t row = first + (z * windows.size[1] + y) * windows.size[2];
      for (int64_t x = 0; x < windows.kernel[2]; ++x) {
        with(row + x);
      }
    }
  }
}

// One window's values from `hidden` (its first value in token 0) on, for `width` values of D.
template <typename Loops, typename T, typename Pooled>
void pool_window(const Windows& windows, int64_t window, const float* weights, const float* scales,
                 float temperature, const T* hidden, int64_t token_width, int64_t width,
                 Pooled* pooled) {
  const int64_t first = windows.first(window);
  RunningSoftmax softmax;
  for_each_token(windows, first,
                 [&](int64_t token) { softmax.add(score(weights[token], temperature)); });
  float sums[kMaxSlice];
  std::fill(sums, sums + width, 0.0f);
  const T* rows[kRows];
  float shares[kRows];
  int num_rows = 0;
  for_each_token(windows, first, [&](int64_t token) {
    rows[num_rows] = hidden + token * token_width;
    const float share = softmax.share(score(weights[token], temperature));
    shares[num_rows] = scales == nullptr ? share : scaled_share(share, scales[token]);
    if (++num_rows == kRows) {
      Loops::add(sums, rows, shares, num_rows, width);
      num_rows = 0;
    }
  });
  Loops::add(sums, rows, shares, num_rows, width);
  Loops::store(sums, pooled, width);
}

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

CpuPool::CpuPool(const Windows& windows, DataType type, const void* hidden, const float* weights,
                 int64_t width, float temperature, void* pooled, Isa isa)
    : windows_(windows),
      type_(type),
      hidden_(hidden),
      weights_(weights),
      width_(width),
      temperature_(temperature),
      pooled_(pooled),
      isa_(isa) {
  const int64_t wanted = (kEnoughParts - 1) / std::max<int64_t>(windows.num_windows(), 1) + 1;
  const int64_t values = (width + wanted - 1) / wanted;
  slice_ = std::clamp((values + kMinSlice - 1) / kMinSlice * kMinSlice, kMinSlice, kMaxSlice);
  num_slices_ = width / slice_ + (width % slice_ != 0);
}

CpuPool::CpuPool(const Windows& windows, const int8_t* hidden, const float* scales,
                 const float* weights, int64_t width, float temperature, float* pooled, Isa isa)
    : CpuPool(windows, kFloat32, hidden, weights, width, temperature, pooled, isa) {
  scales_ = scales;
}

template <typename T, typename Pooled>
void CpuPool::run_as(int64_t part) const {
  const int64_t window = part / num_slices_;
  const int64_t begin = part % num_slices_ * slice_;
  const int64_t width = std::min(slice_, width_ - begin);
  const T* hidden = static_cast<const T*>(hidden_) + begin;
  Pooled* pooled = static_cast<Pooled*>(pooled_) + window * width_ + begin;
  auto* pool = pool_window<Baseline, T, Pooled>;
#if defined(__x86_64__)
  pool = isa_ == Isa::kAvx512 ? pool_window<Avx512, T, Pooled>
         : isa_ == Isa::kAvx2 ? pool_window<Avx2, T, Pooled>
                              : pool;
#endif
  pool(windows_, window, weights_, scales_, temperature_, hidden, width_, width, pooled);
}

void CpuPool::run(int64_t part) const {
  if (scales_ != nullptr) {
    return run_as<int8_t, float>(part);
  }
  switch (type_) {
    case kFloat32:
      return run_as<float>(part);
    case kFloat16:
      return run_as<Float16>(part);
    case kBFloat16:
      return run_as<BFloat16>(part);
  }
}

}  // namespace ppllava

namespace {

int run_all(const ppllava::CpuPool& pool) {
  for (std::int64_t part = 0; part < pool.num_parts(); ++part) {
    pool.run(part);
  }
  return 0;
}

}  // namespace

int strided_weighted_pool_cpu(int dtype, const void* hidden, const float* weights,
                              const std::int64_t size[3], std::int64_t width,
                              const std::int64_t kernel[3], const std::int64_t stride[3],
                              float temperature, void* pooled) {
  if (dtype < ppllava::kFloat32 || dtype > ppllava::kBFloat16 || width < 0) {
    return 1;
  }
  const ppllava::CpuPool pool(ppllava::Windows(size, kernel, stride),
                              static_cast<ppllava::DataType>(dtype), hidden, weights, width,
                              temperature, pooled);
  return run_all(pool);
}

int scaled_strided_weighted_pool_cpu(const std::int8_t* hidden, const float* scales,
                                     const float* weights, const std::int64_t size[3],
                                     std::int64_t width, const std::int64_t kernel[3],
                                     const std::int64_t stride[3], float temperature,
                                     float* pooled) {
  if (width < 0) {
    return 1;
  }
  const ppllava::CpuPool pool(ppllava::Windows(size, kernel, stride), hidden, scales, weights,
                              width, temperature, pooled);
  return run_all(pool);
}
