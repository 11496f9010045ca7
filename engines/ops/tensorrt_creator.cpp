#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "tensorrt_plugin.h"

namespace ppllava {
namespace tensorrt {
namespace {

using nvinfer1::ILogger;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// TensorRT calls setLoggerFinder when it loads the library, from whatever thread.
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

bool read_axes(const PluginField& field, int32_t axes[3]) noexcept {
  const bool is_known =
      field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kINT64;
  if (!is_known || field.length != 3 || field.data == nullptr) {
    complain("the field %s must be three integers", field.name);
    return false;
  }
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t value = field.type == PluginFieldType::kINT32
                              ? static_cast<const int32_t*>(field.data)[axis]
                              : static_cast<const int64_t*>(field.data)[axis];
    if (value < 1 || value > INT32_MAX) {
      complain("the field %s has %lld on axis %d, expected 1 to 2147483647", field.name,
               static_cast<long long>(value), axis);
      return false;
    }
    axes[axis] = static_cast<int32_t>(value);
  }
  return true;
}

bool read_temperature(const PluginField& field, float* temperature) noexcept {
  if (field.type != PluginFieldType::kFLOAT32 || field.length != 1 || field.data == nullptr) {
    complain("the field %s must be one float", field.name);
    return false;
  }
  *temperature = *static_cast<const float*>(field.data);
  if (!std::isfinite(*temperature) || *temperature <= 0.0f) {
    complain("the field %s is %g, expected a positive number", field.name,
             static_cast<double>(*temperature));
    return false;
  }
  return true;
}

bool read_settings(const nvinfer1::PluginFieldCollection* fields, Settings* settings) noexcept {
  bool has_temperature = false;
  bool has_kernel = false;
  bool has_stride = false;
  const int32_t count = fields == nullptr || fields->fields == nullptr ? 0 : fields->nbFields;
  for (int32_t i = 0; i < count; ++i) {
    const PluginField& field = fields->fields[i];
    const char* const name = field.name == nullptr ? "" : field.name;
    bool is_good = true;
    if (std::strcmp(name, kTemperature) == 0) {
      is_good = read_temperature(field, &settings->temperature);
      has_temperature = true;
    } else if (std::strcmp(name, kKernel) == 0) {
      is_good = read_axes(field, settings->kernel);
      has_kernel = true;
    } else if (std::strcmp(name, kStride) == 0) {
      is_good = read_axes(field, settings->stride);
      has_stride = true;
    } else {
      complain("the field %s is unknown, expected %s, %s and %s", name, kTemperature, kKernel,
               kStride);
      return false;
    }
    if (!is_good) {
      return false;
    }
  }
  if (!has_temperature) {
    complain("the field %s is missing", kTemperature);
    return false;
  }
  if (has_kernel != has_stride) {
    complain("the field %s is there without %s: give both, or both as inputs",
             has_kernel ? kKernel : kStride, has_kernel ? kStride : kKernel);
    return false;
  }
  settings->has_windows = has_kernel;
  return true;
}

}  // namespace

void complain(const char* format, ...) noexcept {
  char message[512];
  int length = std::snprintf(message, sizeof message, "%s::%s: ", kNamespace, kName);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + length, sizeof message - static_cast<size_t>(length), format, arguments);
  va_end(arguments);

  ILogger* logger = nullptr;
  try {
    nvinfer1::ILoggerFinder* const finder = logger_finder.load();
    logger = finder == nullptr ? nullptr : finder->findLogger();
  } catch (...) {  // it is not declared noexcept, and we are called across C
  }
  if (logger != nullptr) {
    logger->log(ILogger::Severity::kERROR, message);
  } else {
    std::fprintf(stderr, "%s\n", message);
  }
}

Creator::Creator() noexcept
    : fields_{PluginField(kTemperature, nullptr, PluginFieldType::kFLOAT32, 1),
              PluginField(kKernel, nullptr, PluginFieldType::kINT32, 3),
              PluginField(kStride, nullptr, PluginFieldType::kINT32, 3)},
      collection_{3, fields_} {}

nvinfer1::IPluginV3* Creator::createPlugin(const char* name,
                                           const nvinfer1::PluginFieldCollection* fields,
                                           nvinfer1::TensorRTPhase phase) noexcept {
  (void)name;
  (void)phase;  // what is serialised is what a plugin is created from
  Settings settings;
  if (!read_settings(fields, &settings)) {
    return nullptr;
  }
  return new (std::nothrow) Plugin(settings);
}

const nvinfer1::PluginFieldCollection* Creator::getFieldNames() noexcept { return &collection_; }
const char* Creator::getPluginName() const noexcept { return kName; }
const char* Creator::getPluginVersion() const noexcept { return kVersion; }
const char* Creator::getPluginNamespace() const noexcept { return kNamespace; }

}  // namespace tensorrt
}  // namespace ppllava

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const*
getCreators(int32_t& num_creators) {
  static ppllava::tensorrt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  num_creators = 1;
  return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(
    nvinfer1::ILoggerFinder* finder) {
  ppllava::tensorrt::logger_finder.store(finder);
}
