// Literal and random cases, or those of a file, through every native implementation of strided
// weighted pooling, against a plain loop in double.
//
// `ppllava_pool_test [FILE]`: FILE is what tests/native/test_ctest.py writes.
#include "pool_test.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "cpu.h"

namespace {

using ppllava::Isa;

constexpr int kInt8 = 3;

void run_all(const ppllava::CpuPool& pool) {
  for (std::int64_t part = 0; part < pool.num_parts(); ++part) {
    pool.run(part);
  }
}

template <Isa kIsa>
int pool_by_isa(int dtype, const void* hidden, const float* weights, const std::int64_t size[3],
                std::int64_t width, const std::int64_t kernel[3], const std::int64_t stride[3],
                float temperature, void* pooled) {
  run_all(ppllava::CpuPool(ppllava::Windows(size, kernel, stride),
                           static_cast<ppllava::DataType>(dtype), hidden, weights, width,
                           temperature, pooled, kIsa));
  return 0;
}

template <Isa kIsa>
int scaled_by_isa(const std::int8_t* hidden, const float* scales, const float* weights,
                  const std::int64_t size[3], std::int64_t width, const std::int64_t kernel[3],
                  const std::int64_t stride[3], float temperature, float* pooled) {
  run_all(ppllava::CpuPool(ppllava::Windows(size, kernel, stride), hidden, scales, weights, width,
                           temperature, pooled, kIsa));
  return 0;
}

struct Implementation {
  const char* name;
  PoolFunction* pool;
  ScaledPoolFunction* scaled;  // null where there is none

  int run(const Case& c, const void* hidden, void* pooled) const {
    return c.dtype == kInt8
               ? scaled(static_cast<const std::int8_t*>(hidden), c.scales.data(), c.weights.data(),
                        c.size, c.width, c.kernel, c.stride, c.temperature,
                        static_cast<float*>(pooled))
               : pool(c.dtype, hidden, c.weights.data(), c.size, c.width, c.kernel, c.stride,
                      c.temperature, pooled);
  }
};

std::vector<Implementation> implementations() {
  std::vector<Implementation> all = {
      {"CPU loop", strided_weighted_pool_cpu, scaled_strided_weighted_pool_cpu},
      {"CPU loop, baseline", pool_by_isa<Isa::kBaseline>, scaled_by_isa<Isa::kBaseline>},
      {"custom op", pool_by_custom_op, pool_by_scaled_op}};
  if (ppllava::best_isa() >= Isa::kAvx2) {
    all.push_back({"CPU loop, AVX2", pool_by_isa<Isa::kAvx2>, scaled_by_isa<Isa::kAvx2>});
  }
  if (ppllava::best_isa() >= Isa::kAvx512) {
    all.push_back({"CPU loop, AVX-512", pool_by_isa<Isa::kAvx512>, scaled_by_isa<Isa::kAvx512>});
  } else {
    std::printf("NOT RUN: CPU loop, AVX-512: this processor has none\n");
  }
#if defined(PPLLAVA_CUDA_ON_HOST)
  all.push_back({"CUDA kernel on the host", strided_weighted_pool_cuda_on_host, nullptr});
#else
  std::printf("NOT RUN: CUDA kernel on the host: CUDA's headers were not found\n");
#endif
  return all;
}

constexpr std::size_t kBytes[] = {4, 2, 2, 1};
constexpr double kTolerance[] = {1e-6, 2e-3, 1.5e-2, 1e-6};
// What rounding once to nearest costs, relative to the result: the native implementations do no more.
constexpr double kRounding[] = {0, 0x1p-11, 0x1p-8, 0};
constexpr double kSmallest[] = {0x1p-149, 0x1p-24, 0x1p-133, 127 * 0x1p-149};  // above 0

int pooled_dtype(int dtype) { return dtype == kInt8 ? 0 : dtype; }

std::vector<unsigned char> packed(const std::vector<float>& values, int dtype) {
  std::vector<unsigned char> bytes(values.size() * kBytes[dtype]);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == kInt8) {
      bytes[i] = static_cast<unsigned char>(static_cast<std::int8_t>(values[i]));
      continue;
    }
    const std::uint16_t half = dtype == 1 ? ppllava::from_float<ppllava::Float16>(values[i]).bits
                                          : ppllava::from_float<ppllava::BFloat16>(values[i]).bits;
    std::memcpy(&bytes[i * kBytes[dtype]],
                dtype == 0 ? static_cast<const void*>(&values[i]) : &half, kBytes[dtype]);
  }
  return bytes;
}

std::vector<float> unpacked(const std::vector<unsigned char>& bytes, int dtype) {
  std::vector<float> values(bytes.size() / kBytes[dtype]);
  for (std::size_t i = 0; i < values.size(); ++i) {
    std::uint16_t half = 0;
    std::memcpy(dtype == 0 ? static_cast<void*>(&values[i]) : &half, &bytes[i * kBytes[dtype]],
                kBytes[dtype]);
    if (dtype != 0) {
      values[i] = dtype == 1 ? ppllava::to_float(ppllava::Float16{half})
                             : ppllava::to_float(ppllava::BFloat16{half});
    }
  }
  return values;
}

struct Expected {
  std::vector<double> pooled;
  std::vector<double> bounds;
};

Expected expected(const Case& c) {
  Expected out;
  for (int axis = 0; axis < 3; ++axis) {
    if (c.kernel[axis] < 1 || c.stride[axis] < 1 || c.kernel[axis] > c.size[axis]) {
      return out;
    }
  }
  // Unsigned and without a stride's last step, which may lead past 2^63.
  const auto reach = [&](int axis) { return c.size[axis] - c.kernel[axis]; };
  const auto next = [&](std::int64_t at, int axis) {
    return c.stride[axis] > reach(axis) - at ? reach(axis) + 1 : at + c.stride[axis];
  };
  for (std::int64_t z = 0; z <= reach(0); z = next(z, 0)) {
    for (std::int64_t y = 0; y <= reach(1); y = next(y, 1)) {
      for (std::int64_t x = 0; x <= reach(2); x = next(x, 2)) {
        std::vector<std::size_t> tokens;
        for (std::int64_t i = 0; i < c.kernel[0] * c.kernel[1] * c.kernel[2]; ++i) {
          const std::int64_t a = z + i / c.kernel[2] / c.kernel[1];
          const std::int64_t b = y + i / c.kernel[2] % c.kernel[1];
          const std::int64_t d = x + i % c.kernel[2];
          tokens.push_back(static_cast<std::size_t>((a * c.size[1] + b) * c.size[2] + d));
        }
        std::vector<double> shares;
        for (const std::size_t token : tokens) {
          shares.push_back(static_cast<double>(c.weights[token] / c.temperature));
        }
        const double largest = *std::max_element(shares.begin(), shares.end());
        double sum = 0;
        for (double& share : shares) {
          share = std::exp(share - largest);
          sum += share;
        }
        for (std::int64_t d = 0; d < c.width; ++d) {
          double value = 0, magnitude = 0;
          for (std::size_t i = 0; i < tokens.size(); ++i) {
            const std::size_t at = tokens[i] * static_cast<std::size_t>(c.width);
            const double scale = c.dtype == kInt8 ? static_cast<double>(c.scales[tokens[i]]) : 1;
            const double term = shares[i] / sum * scale *
                                static_cast<double>(c.hidden[at + static_cast<std::size_t>(d)]);
            value += term;
            magnitude += std::abs(term);
          }
          out.pooled.push_back(value);
          // Below the smallest normal numbers each term and the sum round absolutely.
          const double smallest = kSmallest[c.dtype == kInt8 ? kInt8 : 0];
          const double absolute = smallest * static_cast<double>(tokens.size());
          const double once = kTolerance[0] * magnitude + kRounding[c.dtype] * std::abs(value);
          out.bounds.push_back(std::min(c.tolerance * magnitude, once) + absolute +
                               kSmallest[c.dtype]);
        }
      }
    }
  }
  return out;
}

// How many implementations are off by more than the case allows.
int check(const Case& c, const char* name, const std::vector<Implementation>& all) {
  const Expected want = expected(c);
  const std::vector<unsigned char> hidden = packed(c.hidden, c.dtype);
  int wrong = 0;
  for (const Implementation& implementation : all) {
    if (c.dtype == kInt8 && implementation.scaled == nullptr) {
      continue;
    }
    // Exactly as large as it must be, so that a sanitizer sees the first byte beyond.
    std::vector<unsigned char> bytes(want.pooled.size() * kBytes[pooled_dtype(c.dtype)], 0xff);
    const int code = implementation.run(c, hidden.data(), bytes.data());
    const std::vector<float> got = unpacked(bytes, pooled_dtype(c.dtype));
    std::size_t at = 0;
    while (at < got.size() &&
           (std::abs(static_cast<double>(got[at]) - want.pooled[at]) <= want.bounds[at] ||
            (std::isnan(got[at]) && std::isnan(want.pooled[at])))) {
      ++at;
    }
    if (code != 0 || at < got.size()) {
      ++wrong;
      std::printf("FAILED %s: %s: code %d, value %zu is %g, expected %g +- %g\n", name,
                  implementation.name, code, at,
                  at < got.size() ? static_cast<double>(got[at]) : 0.0,
                  at < got.size() ? want.pooled[at] : 0.0, at < got.size() ? want.bounds[at] : 0.0);
    }
  }
  return wrong;
}

struct Literal {
  std::int64_t kernel[3];
  std::int64_t stride[3];
  std::vector<float> weights;
  std::vector<float> pooled;
};

int check_literals(const std::vector<Implementation>& all) {
  const std::int64_t huge = std::int64_t{1} << 62;
  const std::vector<float> even(8, 0.0f);
  std::vector<float> one(8, 0.0f);
  one[5] = 1.0f;  // 100 after the temperature: it takes all of its window
  const float inf = HUGE_VALF;
  const std::vector<Literal> literals = {
      {{2, 2, 2}, {1, 1, 1}, even, {3.5f}},
      {{1, 2, 2}, {1, 1, 1}, even, {1.5f, 5.5f}},
      {{1, 1, 2}, {1, 1, 1}, even, {0.5f, 2.5f, 4.5f, 6.5f}},
      {{2, 1, 1}, {1, 1, 1}, even, {2, 3, 4, 5}},
      {{1, 1, 1}, {2, 2, 2}, even, {0}},
      {{1, 1, 1}, {huge, huge, 2 * (huge - 1) + 1}, even, {0}},
      {{1, 2, 2}, {1, 1, 1}, one, {1.5f, 5}},
      {{1, 1, 4}, {1, 1, 1}, even, {}},
      {{huge, huge, huge}, {1, 1, 1}, even, {}},
      {{1, 1, 1}, {0, 1, 1}, even, {}},
      {{-1, 1, 1}, {1, 1, 1}, even, {}},
      {{1, 1, 1}, {1, -huge, 1}, even, {}},
      // As torch's softmax has it: -inf has no share of its window, unless there is nothing else.
      {{1, 1, 2}, {1, 1, 1}, {-inf, 0, 0, -inf, -inf, -inf, inf, 0}, {1, 2, NAN, NAN}},
      {{1, 1, 2}, {1, 1, 1}, {NAN, 0, 0, NAN, -inf, NAN, inf, inf}, {NAN, NAN, NAN, NAN}},
  };
  int wrong = 0;
  for (std::size_t i = 0; i < literals.size(); ++i) {
    const Literal& literal = literals[i];
    for (int dtype = 0; dtype <= kInt8; ++dtype) {
      Case c{dtype, {2, 2, 2}, 1, {}, {}, 0.01f, 0, {0, 1, 2, 3, 4, 5, 6, 7}, literal.weights, {}};
      std::copy_n(literal.kernel, 3, c.kernel);
      std::copy_n(literal.stride, 3, c.stride);
      if (dtype == kInt8) {  // 0 to 7 as well
        c.hidden = {2, 2, 4, 6, 4, 4, 4, 4};
        c.scales = {0, 0.5f, 0.5f, 0.5f, 1, 1.25f, 1.5f, 1.75f};
      }
      const auto hidden = packed(c.hidden, dtype);
      for (const Implementation& implementation : all) {
        if (dtype == kInt8 && implementation.scaled == nullptr) {
          continue;
        }
        const int made = pooled_dtype(dtype);
        std::vector<unsigned char> bytes(literal.pooled.size() * kBytes[made], 0x55);
        const int code = implementation.run(c, hidden.data(), bytes.data());
        const std::vector<float> got = unpacked(bytes, made);
        const bool same = std::equal(
            got.begin(), got.end(), literal.pooled.begin(), [](float a, float b) {
              return std::isnan(b) ? std::isnan(a) : std::abs(a - b) <= 1e-6f * std::abs(b);
            });
        if (code != 0 || !same) {
          ++wrong;
          std::printf("FAILED literal %zu, dtype %d: %s\n", i, dtype, implementation.name);
        }
      }
    }
  }
  return wrong;
}

struct Rounded {
  float value;
  unsigned half, bfloat;  // bits
};

// To nearest, ties to even; beyond the largest to infinity, and NaN stays one.
int check_rounding() {
  const Rounded all[] = {
      {0.0f, 0x0000, 0x0000},       {-0.0f, 0x8000, 0x8000},      {1.0f, 0x3c00, 0x3f80},
      {0x1.002p0f, 0x3c00, 0x3f80}, {0x1.006p0f, 0x3c02, 0x3f80}, {0x1.01p0f, 0x3c04, 0x3f80},
      {0x1.03p0f, 0x3c0c, 0x3f82},  {65519.0f, 0x7bff, 0x4780},   {65520.0f, 0x7c00, 0x4780},
      {0x1p-14f, 0x0400, 0x3880},   {0x1p-25f, 0x0000, 0x3300},   {0x1.8p-24f, 0x0002, 0x33c0},
      {-0x1p-24f, 0x8001, 0xb380},  {0x1.ffcp-15f, 0x0400, 0x3880}, {-HUGE_VALF, 0xfc00, 0xff80},
      {3.4e38f, 0x7c00, 0x7f80},    {0x1p-133f, 0x0000, 0x0001},  {0x1p-134f, 0x0000, 0x0000},
  };
  int wrong = 0;
  for (const Rounded& one : all) {
    const unsigned half = ppllava::from_float<ppllava::Float16>(one.value).bits;
    const unsigned bfloat = ppllava::from_float<ppllava::BFloat16>(one.value).bits;
    if (half != one.half || bfloat != one.bfloat) {
      ++wrong;
      std::printf("FAILED rounding %a: %04x and %04x\n", static_cast<double>(one.value), half,
                  bfloat);
    }
  }
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto number = static_cast<std::uint16_t>(bits);
    const float half = ppllava::to_float(ppllava::Float16{number});
    const float bfloat = ppllava::to_float(ppllava::BFloat16{number});
    const auto half_again = ppllava::from_float<ppllava::Float16>(half).bits;
    const auto bfloat_again = ppllava::from_float<ppllava::BFloat16>(bfloat).bits;
    const auto nan = [](unsigned again, unsigned infinity) { return (again & 0x7fffu) > infinity; };
    wrong += std::isnan(half) ? !nan(half_again, 0x7c00) : half_again != number;
    wrong += std::isnan(bfloat) ? !nan(bfloat_again, 0x7f80) : bfloat_again != number;
  }
  return wrong;
}

int check_random(const std::vector<Implementation>& all) {
  std::mt19937 random(4);
  const auto upto = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  std::normal_distribution<float> normal;
  int wrong = 0;
  for (int number = 0; number < 200; ++number) {
    Case c{};
    c.dtype = number % 4;
    c.tolerance = kTolerance[c.dtype];
    c.width = number % 10 == 0 ? upto(250, 9000) : upto(0, 70);
    c.temperature = number % 2 == 0 ? 0.01f : 1.0f;
    for (int axis = 0; axis < 3; ++axis) {
      c.size[axis] = upto(1, number % 10 == 0 ? 3 : 7);
      c.kernel[axis] = upto(1, c.size[axis]);
      c.stride[axis] = upto(1, 4);
    }
    const auto tokens = static_cast<std::size_t>(c.size[0] * c.size[1] * c.size[2]);
    c.weights.resize(tokens);
    std::generate(c.weights.begin(), c.weights.end(), [&] { return 0.02f * normal(random); });
    c.hidden.resize(tokens * static_cast<std::size_t>(c.width));
    if (c.dtype == kInt8) {
      std::generate(c.hidden.begin(), c.hidden.end(),
                    [&] { return static_cast<float>(upto(-128, 127)); });
      c.scales.resize(tokens);
      std::generate(c.scales.begin(), c.scales.end(), [&] { return 0.01f * normal(random); });
    } else {
      std::generate(c.hidden.begin(), c.hidden.end(), [&] { return normal(random); });
      c.hidden = unpacked(packed(c.hidden, c.dtype), c.dtype);
    }
    wrong += check(c, ("random " + std::to_string(number)).c_str(), all);
  }
  return wrong;
}

template <typename T>
bool read(std::FILE* file, T* values, std::size_t count) {
  return std::fread(values, sizeof(T), count, file) == count;
}

int check_file(const char* path, const std::vector<Implementation>& all) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
  int wrong = 0, number = 0;
  Case c{};
  while (file != nullptr && read(file.get(), &c.dtype, 1)) {
    bool whole = read(file.get(), c.size, 3) && read(file.get(), &c.width, 1) &&
                 read(file.get(), c.kernel, 3) && read(file.get(), c.stride, 3) &&
                 read(file.get(), &c.temperature, 1) && read(file.get(), &c.tolerance, 1);
    c.weights.resize(static_cast<std::size_t>(c.size[0] * c.size[1] * c.size[2]));
    c.hidden.resize(c.weights.size() * static_cast<std::size_t>(c.width));
    whole = whole && read(file.get(), c.hidden.data(), c.hidden.size()) &&
            read(file.get(), c.weights.data(), c.weights.size());
    c.scales.resize(c.dtype == kInt8 ? c.weights.size() : 0);
    whole = whole && read(file.get(), c.scales.data(), c.scales.size());
    if (!whole) {
      std::printf("FAILED %s ends within case %d\n", path, number);
      return wrong + 1;
    }
    wrong += check(c, ("case " + std::to_string(number++)).c_str(), all);
  }
  std::printf("%d cases of %s\n", number, path);
  return wrong + (number == 0);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<Implementation> all = implementations();
  int wrong = 0;
  if (argc > 1) {
    wrong = check_file(argv[1], all);
  } else {
    wrong = check_rounding() + check_literals(all) + check_random(all) + count_accepted_nonsense();
  }
  std::printf("%zu implementations, %d failures\n", all.size(), wrong);
  return wrong == 0 ? 0 : 1;
}
