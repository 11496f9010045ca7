// Calls the TensorRT plugin as TensorRT would, without TensorRT and without a GPU: what shapes it
// gives, which formats it takes, what it writes into an engine and how it comes back, what it
// refuses, and that it returns an error where the kernel cannot be launched.
//
//   ppllava_plugin_contract libppllava_tensorrt_plugin.so
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "fake_tensorrt.h"

namespace {

using namespace fake;

struct ShapeCase {
  std::vector<int64_t> size;
  std::vector<int64_t> kernel;
  std::vector<int64_t> stride;
  int64_t rows;
};

void check_shapes(const Harness& harness) {
  const int64_t huge = int64_t{1} << 62;
  const int64_t largest = std::numeric_limits<int64_t>::max();
  const std::vector<ShapeCase> cases = {
      {{32, 24, 24}, {2, 3, 3}, {2, 3, 3}, 16 * 8 * 8},
      {{1, 24, 24}, {1, 2, 2}, {1, 2, 2}, 144},
      {{5, 7, 6}, {2, 3, 2}, {1, 2, 3}, 4 * 3 * 2},  // windows overlap, and do not divide
      {{5, 7, 6}, {5, 7, 6}, {9, 9, 9}, 1},
      {{4, 7, 6}, {5, 1, 1}, {3, 1, 1}, 0},  // longer than the grid, by less than a stride
      {{4, 7, 6}, {5, 1, 1}, {1, 1, 1}, 0},
  };
  for (const ShapeCase& given : cases) {
    const int32_t kernel[] = {static_cast<int32_t>(given.kernel[0]),
                              static_cast<int32_t>(given.kernel[1]),
                              static_cast<int32_t>(given.kernel[2])};
    const int32_t stride[] = {static_cast<int32_t>(given.stride[0]),
                              static_cast<int32_t>(given.stride[1]),
                              static_cast<int32_t>(given.stride[2])};
    Opened opened = harness.attributes(kernel, stride);
    Builder builder;
    const nvinfer1::DimsExprs inputs[] = {
        builder.dims({given.size[0], given.size[1], given.size[2], 64}), builder.dims(given.size)};
    nvinfer1::DimsExprs output{};
    EXPECT(opened.build->getOutputShapes(inputs, 2, nullptr, 0, &output, 1, builder) == 0);
    EXPECT(output.nbDims == 2);
    EXPECT(Builder::of(output.d[0]) == given.rows);
    EXPECT(Builder::of(output.d[1]) == 64);
  }

  std::vector<ShapeCase> any = cases;
  any.push_back({{4, 7, 6}, {huge, 1, 1}, {1, 1, 1}, 0});
  any.push_back({{4, 7, 6}, {4, 7, 6}, {largest, largest, huge}, 1});
  any.push_back({{4, 7, 6}, {0, 1, 1}, {1, 1, 1}, 0});
  any.push_back({{4, 7, 6}, {1, 1, 1}, {1, -1, 1}, 0});
  any.push_back({{4, 7, 6}, {1, -largest / 2, 1}, {1, 1, 0}, 0});
  Opened opened(harness.create({temperature_field()}));
  for (const ShapeCase& given : any) {
    for (const int32_t num_inputs : {4, 6}) {
      Builder builder;
      const nvinfer1::DimsExprs axes = builder.dims({3});
      const nvinfer1::DimsExprs inputs[] = {
          builder.dims({given.size[0], given.size[1], given.size[2], 64}), builder.dims(given.size),
          axes, axes, axes, axes};
      const nvinfer1::DimsExprs shape_inputs[] = {builder.dims(given.kernel),
                                                  builder.dims(given.stride)};
      nvinfer1::DimsExprs output{};
      EXPECT(opened.build->getOutputShapes(inputs, num_inputs, shape_inputs, 2, &output, 1,
                                           builder) == 0);
      EXPECT(output.nbDims == 2 && Builder::of(output.d[0]) == given.rows);
    }
  }
}

void check_refused_shapes(const Harness& harness) {
  const int32_t axes[] = {2, 3, 3};
  Opened attributes = harness.attributes(axes, axes);
  Opened inputs(harness.create({temperature_field()}));
  Builder builder;
  const nvinfer1::DimsExprs hidden = builder.dims({4, 6, 6, 64});
  const nvinfer1::DimsExprs weights = builder.dims({4, 6, 6});
  const nvinfer1::DimsExprs three = builder.dims({3});
  const nvinfer1::DimsExprs tensors[] = {hidden, weights, three, three};
  const nvinfer1::DimsExprs flat[] = {weights, weights, three, three};
  const nvinfer1::DimsExprs numbers[] = {builder.dims({2, 3, 3}), builder.dims({2, 3, 3})};
  const nvinfer1::DimsExprs too_few[] = {builder.dims({2, 3}), builder.dims({2, 3, 3})};
  nvinfer1::DimsExprs output{};
  Logger& logger = *harness.logger;

  EXPECT(attributes.build->getOutputShapes(tensors, 4, nullptr, 0, &output, 1, builder) != 0);
  EXPECT(logger.said("got 4 inputs"));
  EXPECT(attributes.build->getOutputShapes(flat, 2, nullptr, 0, &output, 1, builder) != 0);
  EXPECT(logger.said("expected 4 and 3"));
  EXPECT(attributes.build->getOutputShapes(tensors, 2, numbers, 2, &output, 1, builder) != 0);
  EXPECT(logger.said("got 2 shape inputs"));
  EXPECT(inputs.build->getOutputShapes(tensors, 2, nullptr, 0, &output, 1, builder) != 0);
  EXPECT(logger.said("no fields give the two"));
  EXPECT(inputs.build->getOutputShapes(tensors, 4, nullptr, 0, &output, 1, builder) != 0);
  EXPECT(logger.said("got 0 shape inputs"));
  EXPECT(inputs.build->getOutputShapes(tensors, 4, too_few, 2, &output, 1, builder) != 0);
  EXPECT(logger.said("kernel has 2 numbers"));
}

void check_formats(const Harness& harness) {
  const int32_t axes[] = {2, 3, 3};
  Opened attributes = harness.attributes(axes, axes);
  Opened inputs(harness.create({temperature_field()}));
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    DataType output_type = DataType::kBOOL;
    const DataType types[] = {type, DataType::kFLOAT};
    EXPECT(attributes.build->getOutputDataTypes(&output_type, 1, types, 2) == 0);
    EXPECT(output_type == type);

    const nvinfer1::DynamicPluginTensorDesc two[] = {dynamic(type), dynamic(DataType::kFLOAT),
                                                     dynamic(type)};
    for (int32_t position = 0; position < 3; ++position) {
      EXPECT(attributes.build->supportsFormatCombination(position, two, 2, 1));
    }
    const nvinfer1::DynamicPluginTensorDesc six[] = {
        dynamic(type),             dynamic(DataType::kFLOAT), dynamic(DataType::kINT64),
        dynamic(DataType::kINT64), dynamic(DataType::kINT64), dynamic(DataType::kINT64),
        dynamic(type)};
    for (int32_t position = 0; position < 7; ++position) {
      EXPECT(inputs.build->supportsFormatCombination(position, six, 6, 1));
    }
    EXPECT(!inputs.build->supportsFormatCombination(4, six, 4, 1));  // pooled is no int64

    const DataType other = type == DataType::kFLOAT ? DataType::kHALF : DataType::kFLOAT;
    const nvinfer1::DynamicPluginTensorDesc mixed[] = {dynamic(type), dynamic(type),
                                                       dynamic(other)};
    EXPECT(attributes.build->supportsFormatCombination(1, mixed, 2, 1) ==
           (type == DataType::kFLOAT));
    EXPECT(!attributes.build->supportsFormatCombination(2, mixed, 2, 1));
  }
  for (const DataType type : {DataType::kINT8, DataType::kINT32, DataType::kFP8}) {
    const nvinfer1::DynamicPluginTensorDesc tensors[] = {dynamic(type)};
    EXPECT(!attributes.build->supportsFormatCombination(0, tensors, 2, 1));
  }
  for (const TensorFormat format : {TensorFormat::kCHW2, TensorFormat::kHWC8}) {
    const nvinfer1::DynamicPluginTensorDesc tensors[] = {dynamic(DataType::kHALF, format)};
    EXPECT(!attributes.build->supportsFormatCombination(0, tensors, 2, 1));
  }
  EXPECT(attributes.build->getNbOutputs() == 1);

  const nvinfer1::DynamicPluginTensorDesc fitting[] = {
      dynamic(DataType::kHALF, TensorFormat::kLINEAR, {-1, 6, 6, 64}),
      dynamic(DataType::kFLOAT, TensorFormat::kLINEAR, {-1, 6, 6})};
  const nvinfer1::DynamicPluginTensorDesc other_grid[] = {
      fitting[0], dynamic(DataType::kFLOAT, TensorFormat::kLINEAR, {-1, 6, 5})};
  EXPECT(attributes.build->configurePlugin(fitting, 2, fitting, 1) == 0);
  EXPECT(attributes.build->configurePlugin(other_grid, 2, fitting, 1) != 0);
  EXPECT(harness.logger->said("along axis 2"));
}

const PluginField* find(const nvinfer1::PluginFieldCollection& fields, const char* name) {
  const PluginField* const end = fields.fields + fields.nbFields;
  const PluginField* const found = std::find_if(
      fields.fields, end, [&](const PluginField& field) { return !std::strcmp(field.name, name); });
  return found == end ? nullptr : found;
}

void check_serialised(const Harness& harness, Opened original, int32_t num_fields) {
  const std::string id = original.build->getTimingCacheID();
  // Each copy outlives what it was copied from.
  Opened clone(original.plugin->clone());
  original.plugin.reset();
  Opened attached(clone.runtime->attachToContext(nullptr));
  clone.plugin.reset();
  const nvinfer1::PluginFieldCollection* const fields = attached.runtime->getFieldsToSerialize();
  EXPECT(fields != nullptr && fields->nbFields == num_fields);
  Opened read(harness.creator->createPlugin("pool", fields, TensorRTPhase::kRUNTIME));
  attached.plugin.reset();

  const nvinfer1::PluginFieldCollection* const again = read.runtime->getFieldsToSerialize();
  EXPECT(again->nbFields == num_fields);
  EXPECT(*static_cast<const float*>(find(*again, "temperature")->data) == kTemperature);
  EXPECT((find(*again, "kernel") != nullptr) == (num_fields == 3));
  EXPECT(id == read.build->getTimingCacheID());
  EXPECT(!std::strcmp(read.core->getPluginName(), harness.creator->getPluginName()));
  EXPECT(!std::strcmp(read.core->getPluginVersion(), harness.creator->getPluginVersion()));
  EXPECT(!std::strcmp(read.core->getPluginNamespace(), harness.creator->getPluginNamespace()));
}

void check_copies(const Harness& harness) {
  const int32_t kernel[] = {2, 3, 4};
  const int32_t stride[] = {5, 6, 2147483647};
  check_serialised(harness, harness.attributes(kernel, stride), 3);
  check_serialised(harness, Opened(harness.create({temperature_field()})), 1);

  Opened plugin = harness.attributes(kernel, stride);
  const nvinfer1::PluginFieldCollection* const fields = plugin.runtime->getFieldsToSerialize();
  EXPECT(!std::memcmp(find(*fields, "kernel")->data, kernel, sizeof kernel));
  EXPECT(!std::memcmp(find(*fields, "stride")->data, stride, sizeof stride));
  const std::string id = plugin.build->getTimingCacheID();
  EXPECT(id != harness.attributes(stride, kernel).build->getTimingCacheID());
  EXPECT(id != Opened(harness.create({temperature_field()})).build->getTimingCacheID());
}

void check_refused_fields(const Harness& harness) {
  const int32_t axes[] = {2, 3, 3};
  const int32_t zero[] = {2, 0, 3};
  const int32_t negative[] = {-2, 3, 3};
  const int64_t wide[] = {2, 3, 3};
  const int64_t too_wide[] = {2, int64_t{1} << 31, 3};
  const float numbers[] = {0.0f, -1.0f, std::numeric_limits<float>::infinity(),
                           std::numeric_limits<float>::quiet_NaN()};
  const PluginField temperature = temperature_field();
  const PluginField kernel = axes_field("kernel", axes);
  const PluginField stride = axes_field("stride", axes);
  const auto refused = [&](const Fields& fields, const char* why) {
    std::unique_ptr<IPluginV3> plugin(harness.create(fields));
    const bool is_told = harness.logger->said(why);
    return plugin == nullptr && is_told;
  };

  EXPECT(harness.creator->createPlugin("pool", nullptr, TensorRTPhase::kBUILD) == nullptr);
  EXPECT(harness.logger->said("temperature is missing"));
  EXPECT(refused({}, "temperature is missing"));
  EXPECT(refused({kernel, stride}, "temperature is missing"));
  EXPECT(refused({temperature, kernel}, "kernel is there without stride"));
  EXPECT(refused({temperature, stride}, "stride is there without kernel"));
  EXPECT(refused({temperature, axes_field("kernel", zero), stride}, "has 0 on axis 1"));
  EXPECT(refused({temperature, kernel, axes_field("stride", negative)}, "has -2 on axis 0"));
  EXPECT(refused({temperature, {"kernel", too_wide, PluginFieldType::kINT64, 3}, stride},
                 "has 2147483648 on axis 1"));
  EXPECT(refused({temperature, {"kernel", axes, PluginFieldType::kINT32, 2}, stride},
                 "must be three integers"));
  EXPECT(refused({temperature, {"kernel", axes, PluginFieldType::kFLOAT32, 3}, stride},
                 "must be three integers"));
  EXPECT(refused({temperature, {"kernel", nullptr, PluginFieldType::kINT32, 3}, stride},
                 "must be three integers"));
  EXPECT(refused({temperature, {"colour", axes, PluginFieldType::kINT32, 3}}, "colour is unknown"));
  EXPECT(refused({{"temperature", axes, PluginFieldType::kINT32, 1}}, "must be one float"));
  for (const float& number : numbers) {
    EXPECT(refused({temperature_field(&number)}, "expected a positive number"));
  }
  Opened accepted(harness.create({temperature, {"kernel", wide, PluginFieldType::kINT64, 3},
                                  {"stride", wide, PluginFieldType::kINT64, 3}}));

  const nvinfer1::PluginFieldCollection* const names = harness.creator->getFieldNames();
  EXPECT(names->nbFields == 3 && find(*names, "temperature") && find(*names, "kernel") &&
         find(*names, "stride"));
}

// Returns what enqueue returns for host memory, which no kernel may touch.
int32_t enqueue(IPluginV3OneRuntime* runtime, const std::vector<int64_t>& hidden_dims,
                const std::vector<int64_t>& weights_dims, const std::vector<int64_t>& pooled_dims,
                DataType type) {
  const nvinfer1::PluginTensorDesc three = tensor({3}, DataType::kINT64);
  const nvinfer1::PluginTensorDesc weights = tensor(weights_dims, DataType::kFLOAT);
  const nvinfer1::PluginTensorDesc inputs[] = {tensor(hidden_dims, type), weights, three, three};
  const nvinfer1::PluginTensorDesc output = tensor(pooled_dims, type);
  std::vector<float> memory(4096);
  const void* const in[] = {memory.data(), memory.data(), memory.data(), memory.data()};
  void* const out[] = {memory.data()};
  return runtime->enqueue(inputs, &output, in, out, nullptr, nullptr);
}

void check_enqueue(const Harness& harness, bool has_gpu) {
  const int32_t axes[] = {2, 3, 3};
  Opened attributes = harness.attributes(axes, axes);
  Opened inputs(harness.create({temperature_field()}));
  Logger& logger = *harness.logger;
  const std::vector<int64_t> hidden = {4, 6, 6, 16};
  const std::vector<int64_t> weights = {4, 6, 6};

  const nvinfer1::PluginTensorDesc fitting[] = {tensor(hidden, DataType::kHALF),
                                                tensor(weights, DataType::kFLOAT)};
  const nvinfer1::PluginTensorDesc unfitting[] = {fitting[0], tensor({5, 6, 6}, DataType::kFLOAT)};
  EXPECT(attributes.runtime->onShapeChange(fitting, 2, fitting, 1) == 0);
  EXPECT(attributes.runtime->onShapeChange(unfitting, 2, fitting, 1) != 0);
  EXPECT(logger.said("along axis 0"));
  EXPECT(enqueue(attributes.runtime, hidden, weights, {9, 16}, DataType::kHALF) != 0);
  EXPECT(logger.said("9 rows"));
  EXPECT(enqueue(attributes.runtime, hidden, weights, {8, 15}, DataType::kHALF) != 0);
  EXPECT(logger.said("(rows, 16)"));
  EXPECT(enqueue(attributes.runtime, hidden, {4, 6, 5}, {8, 16}, DataType::kHALF) != 0);
  EXPECT(logger.said("along axis 2"));
  EXPECT(enqueue(attributes.runtime, hidden, weights, {8, 16}, DataType::kINT8) != 0);
  EXPECT(logger.said("expected fp32, fp16 or bf16"));
  // Nothing to do needs no GPU.
  EXPECT(enqueue(attributes.runtime, {1, 6, 6, 16}, {1, 6, 6}, {0, 16}, DataType::kHALF) == 0);

  if (has_gpu) {
    std::puts("NOT RUN: enqueue without a GPU: there is one here");
    return;
  }
  for (const DataType type : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
    EXPECT(enqueue(attributes.runtime, hidden, weights, {8, 16}, type) != 0);
    EXPECT(logger.said("the kernel was not launched"));
    EXPECT(enqueue(inputs.runtime, hidden, weights, {8, 16}, type) != 0);
    EXPECT(logger.said("the kernel was not launched"));
  }
  std::puts("NOT RUN: enqueue with a GPU: there is none here");
}

bool finds_gpu() {
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) {
    return false;
  }
  const auto start = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
  return start != nullptr && start(0) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  void* const library = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
  if (library == nullptr) {
    std::fprintf(stderr, "usage: %s libppllava_tensorrt_plugin.so (%s)\n", arguments[0],
                 count == 2 ? dlerror() : "no library given");
    return 2;
  }
  using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(nvinfer1::ILoggerFinder*);
  const auto get_creators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  const auto set_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  EXPECT(get_creators != nullptr && set_finder != nullptr);
  if (failures != 0) {
    return 1;
  }
  Logger logger;
  set_finder(&logger);
  int32_t num_creators = 0;
  nvinfer1::IPluginCreatorInterface* const* const creators = get_creators(num_creators);
  EXPECT(num_creators == 1);
  const Harness harness{static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]), &logger};
  EXPECT(!std::strcmp(harness.creator->getPluginName(), "StridedWeightedPool"));
  EXPECT(!std::strcmp(harness.creator->getPluginVersion(), "1"));
  EXPECT(!std::strcmp(harness.creator->getPluginNamespace(), "ppllava"));

  check_shapes(harness);
  check_refused_shapes(harness);
  check_formats(harness);
  check_copies(harness);
  check_refused_fields(harness);
  check_enqueue(harness, finds_gpu());
  set_finder(nullptr);
  std::printf("plugin contract: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
