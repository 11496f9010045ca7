// ppllava::StridedWeightedPool and ppllava::ScaledStridedWeightedPool for ONNX Runtime's CPU: they
// read the tensors and run the CPU loop on ONNX Runtime's own threads. Loaded, they take the place of
// the function bodies that a graph brings along.

#include <cstdio>
#include <initializer_list>
#include <new>

#include "cpu.h"
#include "onnxruntime_abi.h"

namespace ppllava::ort {
namespace {

enum Input { kHidden, kWeights, kKernel, kStride, kScales, kNumInputs };

// One entry for each type that hidden may have: ONNX Runtime chooses by name and type.
struct Op : OrtCustomOp {
  const char* name;
  DataType type;  // of pooled
  int hidden_type, pooled_type;
  std::size_t num_inputs;
  Input inputs[kNumInputs];  // in their order

  constexpr bool scaled() const { return hidden_type == kTensorInt8; }
};

struct Kernel {
  const OrtApi* api;
  const Op* op;
  float temperature;
};

constexpr int kMaxRank = 8;

struct Shape {
  std::size_t rank;
  std::int64_t sizes[kMaxRank];  // unset when there are more axes
};

// Stops at the first failure, which it hands on.
#define PPLLAVA_RETURN_IF_FAILED(call)      \
  if (OrtStatus* const status_ = (call)) { \
    return status_;                        \
  }

OrtStatus* read(const OrtApi* api, const OrtKernelContext* context, std::size_t input, Shape& shape,
                const void*& data) {
  const OrtValue* value = nullptr;
  PPLLAVA_RETURN_IF_FAILED(KernelContextGetInput::call(api, context, input, &value));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  PPLLAVA_RETURN_IF_FAILED(GetTensorTypeAndShape::call(api, value, &info));
  OrtStatus* status = GetDimensionsCount::call(api, info, &shape.rank);
  if (status == nullptr && shape.rank <= kMaxRank) {
    status = GetDimensions::call(api, info, shape.sizes, shape.rank);
  }
  ReleaseTensorTypeAndShapeInfo::call(api, info);
  PPLLAVA_RETURN_IF_FAILED(status);
  void* mutable_data = nullptr;  // there is no other entry; an input is only read
  PPLLAVA_RETURN_IF_FAILED(
      GetTensorMutableData::call(api, const_cast<OrtValue*>(value), &mutable_data));
  data = mutable_data;
  return nullptr;
}

struct Sentence {
  char text[256];
};

// "(2, 3, 4)"
Sentence words(const Shape& shape) {
  Sentence sentence;
  if (shape.rank > kMaxRank) {
    std::snprintf(sentence.text, sizeof sentence.text, "(%zu axes)", shape.rank);
    return sentence;
  }
  std::size_t at = 0;
  sentence.text[at++] = '(';
  for (std::size_t axis = 0; axis < shape.rank; ++axis) {  // 8 of 20 digits always fit
    at += static_cast<std::size_t>(std::snprintf(sentence.text + at, sizeof sentence.text - at,
                                                 axis == 0 ? "%lld" : ", %lld",
                                                 static_cast<long long>(shape.sizes[axis])));
  }
  std::snprintf(sentence.text + at, sizeof sentence.text - at, ")");
  return sentence;
}

OrtStatus* refuse(const Kernel& kernel, const char* name, const Shape& got, const char* expected) {
  char text[512];
  std::snprintf(text, sizeof text,
                "ppllava::%s: %s has shape %s, expected %s: check what feeds it", kernel.op->name,
                name, words(got).text, expected);
  return CreateStatus::call(kernel.api, kInvalidArgument, text);
}

bool is_grid_of(const Shape& hidden, const Shape& shape) {
  bool same = shape.rank == 3;
  for (int axis = 0; same && axis < 3; ++axis) {
    same = shape.sizes[axis] == hidden.sizes[axis];
  }
  return same;
}

OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
  const OrtApi* api = kernel.api;
  Shape shapes[kNumInputs];
  const void* data[kNumInputs];
  for (std::size_t at = 0; at < kernel.op->num_inputs; ++at) {
    const Input input = kernel.op->inputs[at];
    PPLLAVA_RETURN_IF_FAILED(read(api, context, at, shapes[input], data[input]));
  }
  const Shape& hidden = shapes[kHidden];
  if (hidden.rank != 4) {
    return refuse(kernel, "hidden", hidden, "(T, h, w, D)");
  }
  if (!is_grid_of(hidden, shapes[kWeights])) {
    return refuse(kernel, "weights", shapes[kWeights], "hidden's first three axes");
  }
  if (kernel.op->scaled() && !is_grid_of(hidden, shapes[kScales])) {
    return refuse(kernel, "scales", shapes[kScales], "hidden's first three axes");
  }
  for (const Input input : {kKernel, kStride}) {
    if (shapes[input].rank != 1 || shapes[input].sizes[0] != 3) {
      return refuse(kernel, input == kKernel ? "kernel" : "stride", shapes[input], "(3)");
    }
  }
  const Windows windows(hidden.sizes, static_cast<const std::int64_t*>(data[kKernel]),
                        static_cast<const std::int64_t*>(data[kStride]));
  const std::int64_t width = hidden.sizes[3];
  const std::int64_t pooled_shape[] = {windows.num_windows(), width};
  OrtValue* pooled = nullptr;
  PPLLAVA_RETURN_IF_FAILED(KernelContextGetOutput::call(api, context, 0, pooled_shape, 2, &pooled));
  void* pooled_data = nullptr;
  PPLLAVA_RETURN_IF_FAILED(GetTensorMutableData::call(api, pooled, &pooled_data));
  const auto* weights = static_cast<const float*>(data[kWeights]);
  CpuPool pool =
      kernel.op->scaled()
          ? CpuPool(windows, static_cast<const int8_t*>(data[kHidden]),
                    static_cast<const float*>(data[kScales]), weights, width, kernel.temperature,
                    static_cast<float*>(pooled_data))
          : CpuPool(windows, kernel.op->type, data[kHidden], weights, width, kernel.temperature,
                    pooled_data);
  const std::int64_t parts = pool.num_parts();
  if (parts == 0) {
    return nullptr;
  }
  return KernelContextParallelFor::call(
      api, context,
      [](void* argument, std::size_t part) {
        static_cast<const CpuPool*>(argument)->run(static_cast<std::int64_t>(part));
      },
      static_cast<std::size_t>(parts), 0, &pool);
}

OrtStatus* create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                  void** kernel) {
  float temperature = 0.0f;
  PPLLAVA_RETURN_IF_FAILED(
      KernelInfoGetAttributeFloat::call(api, info, "temperature", &temperature));
  *kernel = new (std::nothrow) Kernel{api, static_cast<const Op*>(op), temperature};
  return *kernel != nullptr
             ? nullptr
             : CreateStatus::call(api, kFail, "ppllava: out of memory for a pooling op");
}

constexpr Op make_op(DataType type, int hidden_type, int pooled_type) {
  Op op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  op.GetInputType = [](const OrtCustomOp* self, std::size_t at) {
    const Input input = static_cast<const Op*>(self)->inputs[at];
    return input == kHidden                         ? static_cast<const Op*>(self)->hidden_type
           : input == kKernel || input == kStride ? kTensorInt64
                                                    : kTensorFloat;
  };
  op.GetInputTypeCount = [](const OrtCustomOp* self) {
    return static_cast<const Op*>(self)->num_inputs;
  };
  op.GetOutputType = [](const OrtCustomOp* self, std::size_t) {
    return static_cast<const Op*>(self)->pooled_type;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> std::size_t { return 1; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kRequired; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, std::size_t) { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, std::size_t) { return kDefaultMemory; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return compute(*static_cast<const Kernel*>(kernel), context);
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.name = "StridedWeightedPool";
  op.type = type;
  op.hidden_type = hidden_type;
  op.pooled_type = pooled_type;
  for (const Input input : {kHidden, kScales, kWeights, kKernel, kStride}) {
    if (input != kScales || op.scaled()) {
      op.inputs[op.num_inputs++] = input;
    }
  }
  return op;
}

constexpr Op make_scaled_op() {
  Op op = make_op(kFloat32, kTensorInt8, kTensorFloat);
  op.name = "ScaledStridedWeightedPool";
  return op;
}

constexpr Op kOps[] = {
    make_op(kFloat32, kTensorFloat, kTensorFloat),
    make_op(kFloat16, kTensorFloat16, kTensorFloat16),
    make_op(kBFloat16, kTensorBFloat16, kTensorBFloat16),
    make_scaled_op(),
};

}  // namespace
}  // namespace ppllava::ort

// What ONNX Runtime calls once the library is loaded for a session. The domain is the process's: it
// must outlive every session, and none says when it ends.
extern "C" PPLLAVA_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                       const OrtApiBase* base) {
  using namespace ppllava::ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    return nullptr;  // without a table there is no way to say so; the function bodies run
  }
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const failure = [api]() -> OrtStatus* {
    PPLLAVA_RETURN_IF_FAILED(CreateCustomOpDomain::call(api, "ppllava", &domain));
    for (const Op& op : kOps) {
      PPLLAVA_RETURN_IF_FAILED(CustomOpDomainAdd::call(api, domain, &op));
    }
    return nullptr;
  }();
  if (failure != nullptr) {
    return CreateStatus::call(api, kFail,
                              "ppllava: ONNX Runtime takes no domain of custom ops: update it");
  }
  return AddCustomOpDomain::call(api, options, domain);
}
