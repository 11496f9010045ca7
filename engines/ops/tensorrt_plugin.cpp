#include "tensorrt_plugin.h"

#include <cstdio>
#include <new>

#include "cuda.cuh"

namespace ppllava {
namespace tensorrt {
namespace {

using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;
using nvinfer1::IExprBuilder;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Inputs, by position. Kernel and stride only in the form that has them as inputs.
constexpr int32_t kHiddenInput = 0;
constexpr int32_t kWeightsInput = 1;
constexpr int32_t kKernelInput = 2;
constexpr int32_t kStrideInput = 3;
constexpr int32_t kAttributesFormInputs = 2;
constexpr int32_t kInputsFormInputs = 4;
constexpr int32_t kShapeInputs = 2;

bool to_data_type(nvinfer1::DataType type, DataType* result) noexcept {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      *result = kFloat32;
      return true;
    case nvinfer1::DataType::kHALF:
      *result = kFloat16;
      return true;
    case nvinfer1::DataType::kBF16:
      *result = kBFloat16;
      return true;
    default:
      return false;
  }
}

// Expressions of output dimensions. An operation on a null is null: the builder gives one for what
// it cannot do, and that is found out once, at the end.
class Expressions {
 public:
  explicit Expressions(IExprBuilder& builder) noexcept : builder_(builder) {}

  const IDimensionExpr* constant(int64_t value) noexcept { return builder_.constant(value); }

  const IDimensionExpr* operation(DimensionOperation operation, const IDimensionExpr* first,
                                  const IDimensionExpr* second) noexcept {
    return first == nullptr || second == nullptr ? nullptr
                                                 : builder_.operation(operation, *first, *second);
  }

  // As Windows counts them: (size - kernel) / stride + 1, or 0. No difference is ever divided while
  // negative, and no sum can overflow.
  const IDimensionExpr* windows_along(const IDimensionExpr* size, const IDimensionExpr* kernel,
                                      const IDimensionExpr* stride) noexcept {
    const IDimensionExpr* const zero = constant(0);
    const IDimensionExpr* const one = constant(1);
    const auto is_positive = [&](const IDimensionExpr* value) {
      return operation(DimensionOperation::kLESS, zero, value);
    };
    const IDimensionExpr* const is_too_long = operation(DimensionOperation::kLESS, size, kernel);
    const IDimensionExpr* const is_valid = operation(
        DimensionOperation::kPROD, operation(DimensionOperation::kSUB, one, is_too_long),
        operation(DimensionOperation::kPROD, is_positive(kernel), is_positive(stride)));
    const IDimensionExpr* const slack = operation(
        DimensionOperation::kMAX, operation(DimensionOperation::kSUB, size, kernel), zero);
    const IDimensionExpr* const steps =
        operation(DimensionOperation::kFLOOR_DIV, slack,
                  operation(DimensionOperation::kMAX, stride, one));
    return operation(DimensionOperation::kPROD, is_valid,
                     operation(DimensionOperation::kSUM, steps, one));
  }

 private:
  IExprBuilder& builder_;
};

// Whether hidden and weights are of one grid; unknown dimensions (-1) agree with any.
bool is_one_grid(const nvinfer1::Dims& hidden, const nvinfer1::Dims& weights) noexcept {
  if (hidden.nbDims != 4 || weights.nbDims != 3) {
    complain("hidden has %d and weights %d dimensions, expected 4 and 3", hidden.nbDims,
             weights.nbDims);
    return false;
  }
  for (int axis = 0; axis < 3; ++axis) {
    if (hidden.d[axis] >= 0 && weights.d[axis] >= 0 && hidden.d[axis] != weights.d[axis]) {
      complain("hidden has %lld and weights %lld tokens along axis %d, expected the same",
               static_cast<long long>(hidden.d[axis]), static_cast<long long>(weights.d[axis]),
               axis);
      return false;
    }
  }
  return true;
}

}  // namespace

Plugin::Plugin(const Settings& settings) noexcept
    : settings_(settings),
      fields_{PluginField(kTemperature, &settings_.temperature, PluginFieldType::kFLOAT32, 1),
              PluginField(kKernel, settings_.kernel, PluginFieldType::kINT32, 3),
              PluginField(kStride, settings_.stride, PluginFieldType::kINT32, 3)},
      collection_{settings.has_windows ? 3 : 1, fields_} {
  const int32_t* const k = settings_.kernel;
  const int32_t* const s = settings_.stride;
  if (settings_.has_windows) {
    std::snprintf(timing_cache_id_, sizeof timing_cache_id_, "%dx%dx%d/%dx%dx%d", k[0], k[1], k[2],
                  s[0], s[1], s[2]);
  } else {
    std::snprintf(timing_cache_id_, sizeof timing_cache_id_, "inputs");
  }
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept { return new (std::nothrow) Plugin(settings_); }

const char* Plugin::getPluginName() const noexcept { return kName; }
const char* Plugin::getPluginVersion() const noexcept { return kVersion; }
const char* Plugin::getPluginNamespace() const noexcept { return kNamespace; }

bool Plugin::takes(int32_t num_inputs, int32_t num_outputs) const noexcept {
  const bool is_taken = settings_.has_windows ? num_inputs == kAttributesFormInputs
                                              : num_inputs == kInputsFormInputs ||
                                                    num_inputs == kInputsFormInputs + kShapeInputs;
  if (!is_taken || num_outputs != 1) {
    complain("got %d inputs and %d outputs, expected %s, and one output", num_inputs, num_outputs,
             settings_.has_windows ? "hidden and weights"
                                   : "hidden, weights, kernel and stride (no fields give the two)");
    return false;
  }
  return true;
}

int32_t Plugin::getNbOutputs() const noexcept { return 1; }

int32_t Plugin::getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs,
                                   const nvinfer1::DataType* inputs,
                                   int32_t num_inputs) const noexcept {
  if (!takes(num_inputs, num_outputs)) {
    return 1;
  }
  outputs[0] = inputs[kHiddenInput];
  return 0;
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                                nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                IExprBuilder& builder) noexcept {
  if (!takes(num_inputs, num_outputs)) {
    return 1;
  }
  const nvinfer1::DimsExprs& hidden = inputs[kHiddenInput];
  const nvinfer1::DimsExprs& weights = inputs[kWeightsInput];
  if (hidden.nbDims != 4 || weights.nbDims != 3) {
    complain("hidden has %d and weights %d dimensions, expected 4 and 3", hidden.nbDims,
             weights.nbDims);
    return 1;
  }
  if (num_shape_inputs != (settings_.has_windows ? 0 : kShapeInputs)) {
    complain("got %d shape inputs, expected %s", num_shape_inputs,
             settings_.has_windows ? "none" : "kernel and stride");
    return 1;
  }
  if (!settings_.has_windows && (shape_inputs[0].nbDims != 3 || shape_inputs[1].nbDims != 3)) {
    complain("kernel has %d numbers and stride %d, expected 3 each", shape_inputs[0].nbDims,
             shape_inputs[1].nbDims);
    return 1;
  }

  Expressions expressions(builder);
  const IDimensionExpr* rows = expressions.constant(1);
  for (int axis = 0; axis < 3; ++axis) {
    const IDimensionExpr* const kernel = settings_.has_windows
                                             ? expressions.constant(settings_.kernel[axis])
                                             : shape_inputs[0].d[axis];
    const IDimensionExpr* const stride = settings_.has_windows
                                             ? expressions.constant(settings_.stride[axis])
                                             : shape_inputs[1].d[axis];
    rows = expressions.operation(DimensionOperation::kPROD, rows,
                                 expressions.windows_along(hidden.d[axis], kernel, stride));
  }
  if (rows == nullptr) {
    complain("TensorRT could not express the number of windows");
    return 1;
  }
  outputs[0].nbDims = 2;
  outputs[0].d[0] = rows;
  outputs[0].d[1] = hidden.d[3];
  return 0;
}

bool Plugin::supportsFormatCombination(int32_t position,
                                       const nvinfer1::DynamicPluginTensorDesc* tensors,
                                       int32_t num_inputs, int32_t num_outputs) noexcept {
  if (!takes(num_inputs, num_outputs) || position < 0 || position > num_inputs) {
    return false;
  }
  const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) {
    return false;
  }
  DataType type;
  if (position == kHiddenInput) {
    return to_data_type(tensor.type, &type);
  }
  if (position == num_inputs) {  // pooled
    return tensor.type == tensors[kHiddenInput].desc.type;
  }
  return tensor.type ==
         (position == kWeightsInput ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kINT64);
}

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                const nvinfer1::DynamicPluginTensorDesc* outputs,
                                int32_t num_outputs) noexcept {
  (void)outputs;
  return takes(num_inputs, num_outputs) &&
                 is_one_grid(inputs[kHiddenInput].desc.dims, inputs[kWeightsInput].desc.dims)
             ? 0
             : 1;
}

const char* Plugin::getTimingCacheID() noexcept { return timing_cache_id_; }

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                              const nvinfer1::PluginTensorDesc* outputs,
                              int32_t num_outputs) noexcept {
  (void)outputs;
  return takes(num_inputs, num_outputs) &&
                 is_one_grid(inputs[kHiddenInput].dims, inputs[kWeightsInput].dims)
             ? 0
             : 1;
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                        const nvinfer1::PluginTensorDesc* output_descriptions,
                        const void* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  (void)workspace;
  const nvinfer1::Dims& hidden = input_descriptions[kHiddenInput].dims;
  const nvinfer1::Dims& pooled = output_descriptions[0].dims;
  DataType type;
  if (!to_data_type(input_descriptions[kHiddenInput].type, &type)) {
    complain("hidden is of type %d, expected fp32, fp16 or bf16",
             static_cast<int>(input_descriptions[kHiddenInput].type));
    return 1;
  }
  if (!is_one_grid(hidden, input_descriptions[kWeightsInput].dims)) {
    return 1;
  }
  if (pooled.nbDims != 2 || pooled.d[1] != hidden.d[3]) {
    complain("pooled has %d dimensions, expected (rows, %lld)", pooled.nbDims,
             static_cast<long long>(hidden.d[3]));
    return 1;
  }

  cuda::Pooling pooling = {};
  pooling.hidden = inputs[kHiddenInput];
  pooling.weights = static_cast<const float*>(inputs[kWeightsInput]);
  pooling.width = hidden.d[3];
  for (int axis = 0; axis < 3; ++axis) {
    pooling.size[axis] = hidden.d[axis];
    pooling.kernel[axis] = settings_.kernel[axis];
    pooling.stride[axis] = settings_.stride[axis];
  }
  if (!settings_.has_windows) {
    pooling.device_kernel = static_cast<const int64_t*>(inputs[kKernelInput]);
    pooling.device_stride = static_cast<const int64_t*>(inputs[kStrideInput]);
  }
  pooling.temperature = settings_.temperature;
  pooling.pooled = outputs[0];
  pooling.rows = pooled.d[0];
  if (settings_.has_windows) {
    const Windows windows(pooling.size, pooling.kernel, pooling.stride);
    if (windows.num_windows() != pooling.rows) {
      complain("pooled has %lld rows, expected one for each of %lld windows",
               static_cast<long long>(pooling.rows), static_cast<long long>(windows.num_windows()));
      return 1;
    }
  }

  const cudaError_t error = cuda::launch(type, pooling, stream);
  if (error != cudaSuccess) {
    complain("the kernel was not launched: %s (CUDA error %d)", cudaGetErrorString(error),
             static_cast<int>(error));
    return 1;
  }
  return 0;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* context) noexcept {
  (void)context;
  return clone();
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
  return &collection_;
}

}  // namespace tensorrt
}  // namespace ppllava
