// What TensorRT brings to a plugin and does with it, for a test without TensorRT: dimension
// expressions that are their values at once, a logger that remembers what it was told, tensors
// without memory.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace fake {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::IPluginV3;
using nvinfer1::IPluginV3OneBuild;
using nvinfer1::IPluginV3OneCore;
using nvinfer1::IPluginV3OneRuntime;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorFormat;
using nvinfer1::TensorRTPhase;

inline int failures = 0;

inline void expect(bool is_so, const char* what, int line) {
  if (!is_so) {
    std::fprintf(stderr, "line %d: not so: %s\n", line, what);
    ++failures;
  }
}
#define EXPECT(condition) fake::expect((condition), #condition, __LINE__)

class Value final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Value(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const noexcept override { return false; }
  int64_t getConstantValue() const noexcept override {
    return std::numeric_limits<int64_t>::min();
  }
  bool isSizeTensor() const noexcept override { return false; }
  int64_t value() const { return value_; }

 private:
  int64_t value_;
};

class Builder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  const nvinfer1::IDimensionExpr* constant(int64_t value) noexcept override {
    return &values_.emplace_back(value);
  }
  const nvinfer1::IDimensionExpr* operation(
      DimensionOperation operation, const nvinfer1::IDimensionExpr& first,
      const nvinfer1::IDimensionExpr& second) noexcept override {
    const int64_t a = of(&first);
    const int64_t b = of(&second);
    int64_t result = 0;
    bool is_exact = true;
    switch (operation) {
      case DimensionOperation::kSUM:
        is_exact = !__builtin_add_overflow(a, b, &result);
        break;
      case DimensionOperation::kPROD:
        is_exact = !__builtin_mul_overflow(a, b, &result);
        break;
      case DimensionOperation::kSUB:
        is_exact = !__builtin_sub_overflow(a, b, &result);
        break;
      case DimensionOperation::kMAX:
        result = std::max(a, b);
        break;
      case DimensionOperation::kMIN:
        result = std::min(a, b);
        break;
      case DimensionOperation::kEQUAL:
        result = a == b;
        break;
      case DimensionOperation::kLESS:
        result = a < b;
        break;
      case DimensionOperation::kFLOOR_DIV:
      case DimensionOperation::kCEIL_DIV:
        is_exact = a >= 0 && b > 0;  // what TensorRT does elsewhere is not documented
        result = is_exact ? (a + (operation == DimensionOperation::kCEIL_DIV ? b - 1 : 0)) / b : 0;
        break;
    }
    EXPECT(is_exact);
    return constant(result);
  }
  const nvinfer1::IDimensionExpr* declareSizeTensor(
      int32_t, const nvinfer1::IDimensionExpr&, const nvinfer1::IDimensionExpr&) noexcept override {
    return nullptr;
  }
  nvinfer1::DimsExprs dims(const std::vector<int64_t>& values) {
    nvinfer1::DimsExprs result{};
    result.nbDims = static_cast<int32_t>(values.size());
    for (size_t i = 0; i < values.size(); ++i) {
      result.d[i] = constant(values[i]);
    }
    return result;
  }
  static int64_t of(const nvinfer1::IDimensionExpr* expression) {
    return static_cast<const Value*>(expression)->value();
  }

 private:
  std::deque<Value> values_;
};

class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
 public:
  void log(Severity, const char* message) noexcept override { messages_.emplace_back(message); }
  nvinfer1::ILogger* findLogger() override { return this; }
  // Whether something was said since the last call, and it contains `part`.
  bool said(const char* part) {
    std::vector<std::string> messages;
    messages.swap(messages_);
    return std::any_of(messages.begin(), messages.end(), [&](const std::string& message) {
      return message.find(part) != std::string::npos;
    });
  }

 private:
  std::vector<std::string> messages_;
};

struct Opened {
  std::unique_ptr<IPluginV3> plugin;
  IPluginV3OneCore* core = nullptr;
  IPluginV3OneBuild* build = nullptr;
  IPluginV3OneRuntime* runtime = nullptr;

  explicit Opened(IPluginV3* made) : plugin(made) {
    EXPECT(made != nullptr);
    if (made == nullptr) {
      std::exit(1);
    }
    const auto capability = [&](PluginCapabilityType type) {
      return made->getCapabilityInterface(type);
    };
    core = static_cast<IPluginV3OneCore*>(capability(PluginCapabilityType::kCORE));
    build = static_cast<IPluginV3OneBuild*>(capability(PluginCapabilityType::kBUILD));
    runtime = static_cast<IPluginV3OneRuntime*>(capability(PluginCapabilityType::kRUNTIME));
    EXPECT(core != nullptr && build != nullptr && runtime != nullptr);
  }
};

inline constexpr float kTemperature = 0.01f;

using Fields = std::vector<PluginField>;

inline PluginField temperature_field(const float* value = &kTemperature) {
  return {"temperature", value, PluginFieldType::kFLOAT32, 1};
}

inline PluginField axes_field(const char* name, const int32_t* axes) {
  return {name, axes, PluginFieldType::kINT32, 3};
}

struct Harness {
  nvinfer1::IPluginCreatorV3One* creator;
  Logger* logger;

  IPluginV3* create(const Fields& fields, TensorRTPhase phase = TensorRTPhase::kBUILD) const {
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()),
                                                     fields.data()};
    return creator->createPlugin("pool", &collection, phase);
  }

  Opened attributes(const int32_t* kernel, const int32_t* stride) const {
    return Opened(create({temperature_field(), axes_field("kernel", kernel),
                          axes_field("stride", stride)}));
  }
};

inline nvinfer1::PluginTensorDesc tensor(const std::vector<int64_t>& dims, DataType type,
                                         TensorFormat format = TensorFormat::kLINEAR) {
  nvinfer1::PluginTensorDesc result{};
  result.dims.nbDims = static_cast<int32_t>(dims.size());
  std::copy(dims.begin(), dims.end(), result.dims.d);
  result.type = type;
  result.format = format;
  return result;
}

inline nvinfer1::DynamicPluginTensorDesc dynamic(DataType type,
                                                 TensorFormat format = TensorFormat::kLINEAR,
                                                 const std::vector<int64_t>& dims = {}) {
  nvinfer1::DynamicPluginTensorDesc result{};
  result.desc = tensor(dims, type, format);
  return result;
}

}  // namespace fake
