// The TensorRT plugin ppllava::StridedWeightedPool, version 1, for TensorRT 10.3 and later.
//
// Two forms, told apart by whether kernel and stride are among the creator's fields:
//
//   attributes  hidden (T, h, w, D), weights (T, h, w)
//   inputs      hidden, weights, kernel (3), stride (3), and kernel and stride once more as shape
//               inputs: tensorrt_plugin_shape_input_indices = [4, 5]
//
// Why twice: TensorRT shows a shape input's values to getOutputShapes alone, as expressions, and
// never to onShapeChange or enqueue. So the output's shape comes from the shape inputs, and the
// kernel reads the same numbers on the device, through an ordinary int64 input. Whether shape
// inputs are counted among a plugin's inputs is told in no document and answered both ways by
// public plugins, so both are taken. TensorRT's parser knows the attribute since 10.1.
//
// Both must be the same tensors, as `graphs.write_graph` makes them: nobody can compare them here,
// and where the device's say fewer windows than the shape inputs', the rows beyond stay unwritten.
#pragma once

#include <NvInferRuntime.h>

#include "strided_weighted_pool.h"

namespace ppllava {
namespace tensorrt {

inline constexpr char kName[] = "StridedWeightedPool";
inline constexpr char kVersion[] = "1";
inline constexpr char kNamespace[] = "ppllava";

// Names of the creator's fields, and of the attributes of an ONNX node.
inline constexpr char kTemperature[] = "temperature";
inline constexpr char kKernel[] = "kernel";
inline constexpr char kStride[] = "stride";

// Says in one sentence what went wrong; on stderr where TensorRT has given no logger.
__attribute__((format(printf, 1, 2))) void complain(const char* format, ...) noexcept;

// What a plugin is made of, and all that is written into an engine.
struct Settings {
  float temperature = 1.0f;
  bool has_windows = false;  // kernel and stride are attributes
  // 32 bits: the parser reads no more from an attribute.
  int32_t kernel[3] = {0, 0, 0};
  int32_t stride[3] = {0, 0, 0};
};

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Settings& settings) noexcept;
  ~Plugin() override = default;
  Plugin(const Plugin&) = delete;
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs,
                             const nvinfer1::DataType* inputs,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) noexcept override;
  const char* getTimingCacheID() noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                  const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  bool takes(int32_t num_inputs, int32_t num_outputs) const noexcept;

  Settings settings_;
  char timing_cache_id_[80];
  nvinfer1::PluginField fields_[3];
  nvinfer1::PluginFieldCollection collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() noexcept;

  // Null, and a sentence to the logger, for fields that are no settings.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  nvinfer1::PluginField fields_[3];
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace tensorrt
}  // namespace ppllava

// What TensorRT's registry looks up in a plugin library; nothing else is exported.
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);
