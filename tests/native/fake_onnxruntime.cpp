// ONNX Runtime's side of the custom op's interface, so that sanitizers see all of the op, and so
// that an entry of OrtApi which the op should not know is noticed by its number.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "onnxruntime_abi.h"
#include "pool_test.h"

struct OrtStatus {
  int code;
  std::string message;
};
struct OrtValue {
  int type;
  std::vector<std::int64_t> shape;
  void* data;
};
struct OrtTensorTypeAndShapeInfo {
  std::vector<std::int64_t> shape;
};
struct OrtCustomOpDomain {
  std::string name;
  std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
  OrtCustomOpDomain* domain;
};
struct OrtKernelInfo {
  float temperature;
};
struct OrtKernelContext {
  std::vector<OrtValue> inputs;
  OrtValue output;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);

namespace {

constexpr std::size_t kEntries = 275;  // of version 17, but for its last few
// float, float16, bfloat16 and int8 of ONNXTensorElementDataType: what hidden is, and pooled then
constexpr int kTypes[] = {1, 10, 16, 3};
constexpr int kPooledTypes[] = {1, 10, 16, 1};
constexpr int kScaled = 3;
using Any = void (*)();

template <std::size_t kIndex>
void unknown() {
  std::fprintf(stderr, "entry %zu of OrtApi was called, which the op has no use for\n", kIndex);
  std::abort();
}

template <std::size_t... kIndex>
std::array<Any, kEntries> unknown_entries(std::index_sequence<kIndex...>) {
  return {unknown<kIndex>...};
}

template <typename Result, typename... Arguments>
Any any(Result (*function)(Arguments...)) {
  return reinterpret_cast<Any>(function);
}

OrtStatus* create_status(int code, const char* message) { return new OrtStatus{code, message}; }
OrtStatus* create_domain(const char* name, OrtCustomOpDomain** domain) {
  *domain = new OrtCustomOpDomain{name, {}};
  return nullptr;
}
OrtStatus* add_op(OrtCustomOpDomain* domain, const OrtCustomOp* op) {
  domain->ops.push_back(op);
  return nullptr;
}
OrtStatus* add_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  options->domain = domain;
  return nullptr;
}
OrtStatus* tensor_data(OrtValue* value, void** data) {
  *data = value->data;
  return nullptr;
}
OrtStatus* dimensions_count(const OrtTensorTypeAndShapeInfo* info, std::size_t* count) {
  *count = info->shape.size();
  return nullptr;
}
OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, std::int64_t* into, std::size_t count) {
  std::copy_n(info->shape.begin(), count, into);
  return nullptr;
}
OrtStatus* type_and_shape(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) {
  *info = new OrtTensorTypeAndShapeInfo{value->shape};
  return nullptr;
}
void release_type_and_shape(OrtTensorTypeAndShapeInfo* info) { delete info; }
OrtStatus* attribute_float(const OrtKernelInfo* info, const char* name, float* value) {
  if (info == nullptr || std::strcmp(name, "temperature") != 0) {
    return create_status(2, "no such attribute");
  }
  *value = info->temperature;
  return nullptr;
}
OrtStatus* get_input(const OrtKernelContext* context, std::size_t index, const OrtValue** value) {
  *value = &context->inputs.at(index);
  return nullptr;
}
OrtStatus* get_output(OrtKernelContext* context, std::size_t, const std::int64_t* shape,
                      std::size_t rank, OrtValue** value) {
  if (!std::equal(shape, shape + rank, context->output.shape.begin(), context->output.shape.end())) {
    return create_status(2, "the output has another shape");
  }
  *value = &context->output;
  return nullptr;
}
OrtStatus* parallel_for(const OrtKernelContext*, void (*function)(void*, std::size_t),
                        std::size_t total, std::size_t, void* argument) {
  for (std::size_t i = total; i-- > 0;) {  // any order must do
    function(argument, i);
  }
  return nullptr;
}

const std::array<Any, kEntries> kTable = [] {
  auto table = unknown_entries(std::make_index_sequence<kEntries>());
  table[0] = any(create_status);
  table[26] = any(create_domain);
  table[27] = any(add_op);
  table[28] = any(add_domain);
  table[51] = any(tensor_data);
  table[61] = any(dimensions_count);
  table[62] = any(dimensions);
  table[65] = any(type_and_shape);
  table[85] = any(attribute_float);
  table[90] = any(get_input);
  table[91] = any(get_output);
  table[99] = any(release_type_and_shape);
  table[274] = any(parallel_for);
  return table;
}();

const OrtApi* get_api(std::uint32_t version) {
  return version == 17 ? reinterpret_cast<const OrtApi*>(kTable.data()) : nullptr;
}
const OrtApi* get_no_api(std::uint32_t) { return nullptr; }
const char* version_string() { return "1.17.0"; }

// Whether the status is a failure; prints it when it should be none.
bool failed(OrtStatus* status, bool expected = false) {
  if (status == nullptr) {
    return false;
  }
  if (!expected) {
    std::fprintf(stderr, "%s\n", status->message.c_str());
  }
  delete status;
  return true;
}

const OrtCustomOp* find_op(int dtype) {
  const OrtApiBase base{get_api, version_string};
  OrtSessionOptions options{};
  if (failed(RegisterCustomOps(&options, &base)) || options.domain == nullptr ||
      options.domain->name != "ppllava") {
    return nullptr;
  }
  const char* name = dtype == kScaled ? "ScaledStridedWeightedPool" : "StridedWeightedPool";
  const std::vector<int> others =
      dtype == kScaled ? std::vector<int>{1, 1, 7, 7} : std::vector<int>{1, 7, 7};
  for (const OrtCustomOp* op : options.domain->ops) {
    bool known = op->version == 17 && op->GetInputTypeCount(op) == 1 + others.size() &&
                 op->GetOutputTypeCount(op) == 1 && std::strcmp(op->GetName(op), name) == 0;
    for (std::size_t i = 0; known && i < others.size(); ++i) {
      known = op->GetInputType(op, i + 1) == others[i];
    }
    if (known && op->GetInputType(op, 0) == kTypes[dtype] &&
        op->GetOutputType(op, 0) == kPooledTypes[dtype]) {
      return op;
    }
  }
  return nullptr;
}

// 0 when the op ran, 1 when it refused, 2 when there is no op.
int run(int dtype, float temperature, OrtKernelContext& context, bool refusal_expected = false) {
  const OrtCustomOp* op = find_op(dtype);
  if (op == nullptr) {
    return 2;
  }
  const OrtKernelInfo info{temperature};
  void* kernel = nullptr;
  if (failed(op->CreateKernelV2(op, get_api(17), &info, &kernel))) {
    return 2;
  }
  const bool refused = failed(op->KernelComputeV2(kernel, &context), refusal_expected);
  op->KernelDestroy(kernel);
  return refused ? 1 : 0;
}

}  // namespace

namespace {

int run_as(int dtype, const void* hidden, const float* scales, const float* weights,
           const std::int64_t size[3], std::int64_t width, const std::int64_t kernel[3],
           const std::int64_t stride[3], float temperature, void* pooled) {
  std::int64_t windows = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const bool none = kernel[axis] < 1 || stride[axis] < 1 || kernel[axis] > size[axis];
    windows *= none ? 0 : (size[axis] - kernel[axis]) / stride[axis] + 1;
  }
  const auto in = [](const void* data) { return const_cast<void*>(data); };
  OrtKernelContext context{{{kTypes[dtype], {size[0], size[1], size[2], width}, in(hidden)},
                            {1, {size[0], size[1], size[2]}, in(scales)},
                            {1, {size[0], size[1], size[2]}, in(weights)},
                            {7, {3}, in(kernel)},
                            {7, {3}, in(stride)}},
                           {kPooledTypes[dtype], {windows, width}, pooled}};
  if (dtype != kScaled) {
    context.inputs.erase(context.inputs.begin() + 1);
  }
  return run(dtype, temperature, context);
}

}  // namespace

int pool_by_custom_op(int dtype, const void* hidden, const float* weights,
                      const std::int64_t size[3], std::int64_t width, const std::int64_t kernel[3],
                      const std::int64_t stride[3], float temperature, void* pooled) {
  return run_as(dtype, hidden, nullptr, weights, size, width, kernel, stride, temperature, pooled);
}

int pool_by_scaled_op(const std::int8_t* hidden, const float* scales, const float* weights,
                      const std::int64_t size[3], std::int64_t width, const std::int64_t kernel[3],
                      const std::int64_t stride[3], float temperature, float* pooled) {
  return run_as(kScaled, hidden, scales, weights, size, width, kernel, stride, temperature, pooled);
}

int count_accepted_nonsense() {
  int accepted = 0;
  const OrtApiBase old{get_no_api, version_string};
  OrtSessionOptions options{};
  accepted += RegisterCustomOps(&options, &old) != nullptr || options.domain != nullptr;

  void* kernel = nullptr;
  const OrtCustomOp* op = find_op(0);
  accepted += !failed(op->CreateKernelV2(op, get_api(17), nullptr, &kernel), true);

  const std::vector<std::vector<std::int64_t>> good = {{2, 3, 4, 5}, {2, 3, 4}, {3}, {3}};
  const std::vector<std::pair<std::size_t, std::vector<std::int64_t>>> bad = {
      {0, {2, 3, 4}}, {0, {1, 2, 3, 4, 5, 6, 7, 8, 9}}, {0, {}}, {0, {2, 3, 5, 5}}, {1, {2, 3}},
      {1, {2, 3, 3}}, {1, {2, 3, 4, 1}},       {2, {1, 3}}, {2, {2}},          {2, {}},
      {3, {4}},       {3, {3, 1}}};
  std::vector<float> values(1000);
  const auto accepts = [&](int dtype, const std::vector<std::vector<std::int64_t>>& shapes) {
    OrtKernelContext context{{}, {1, {0, 0}, values.data()}};
    for (const std::vector<std::int64_t>& shape : shapes) {
      context.inputs.push_back({1, shape, values.data()});
    }
    return run(dtype, 0.01f, context, true) != 1;
  };
  for (const auto& [input, shape] : bad) {
    auto shapes = good;
    shapes[input] = shape;
    accepted += accepts(0, shapes);
    shapes.insert(shapes.begin() + 1, {2, 3, 4});  // scales
    accepted += accepts(kScaled, shapes);
  }
  for (const std::vector<std::int64_t>& scales :
       std::vector<std::vector<std::int64_t>>{{}, {2, 3}, {2, 3, 3}, {2, 3, 4, 1}, {1, 3, 4}}) {
    accepted += accepts(kScaled, {{2, 3, 4, 5}, scales, {2, 3, 4}, {3}, {3}});
  }
  return accepted;
}
