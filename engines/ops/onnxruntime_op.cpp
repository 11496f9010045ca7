// ppllava::StridedWeightedPool for ONNX Runtime's CPU: reads the tensors, runs the CPU loop on ONNX
// Runtime's own threads. Loaded, it takes the place of the function body that a graph brings along.

#include <cstdio>
#include <initializer_list>
#include <new>

#include "cpu.h"
#include "onnxruntime_abi.h"

namespace ppllava::ort {
namespace {

enum Input { kHidden, kWeights, kKernel, kStride, kNumInputs };

struct Kernel {
  const OrtApi* api;
  DataType type;
  float temperature;
};

// One entry for each type that hidden and pooled may have: ONNX Runtime chooses by it.
struct Op : OrtCustomOp {
  DataType type;
  int tensor_type;
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

OrtStatus* read(const OrtApi* api, const OrtKernelContext* context, Input input, Shape& shape,
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

OrtStatus* refuse(const OrtApi* api, const char* name, const Shape& got, const char* expected) {
  char text[512];
  std::snprintf(text, sizeof text,
                "ppllava::StridedWeightedPool: %s has shape %s, expected %s: check what feeds it",
                name, words(got).text, expected);
  return CreateStatus::call(api, kInvalidArgument, text);
}

OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
  const OrtApi* api = kernel.api;
  Shape shapes[kNumInputs];
  const void* data[kNumInputs];
  for (const Input input : {kHidden, kWeights, kKernel, kStride}) {
    PPLLAVA_RETURN_IF_FAILED(read(api, context, input, shapes[input], data[input]));
  }
  const Shape& hidden = shapes[kHidden];
  const Shape& weights = shapes[kWeights];
  if (hidden.rank != 4) {
    return refuse(api, "hidden", hidden, "(T, h, w, D)");
  }
  bool same = weights.rank == 3;
  for (int axis = 0; same && axis < 3; ++axis) {
    same = weights.sizes[axis] == hidden.sizes[axis];
  }
  if (!same) {
    return refuse(api, "weights", weights, "hidden's first three axes");
  }
  for (const Input input : {kKernel, kStride}) {
    if (shapes[input].rank != 1 || shapes[input].sizes[0] != 3) {
      return refuse(api, input == kKernel ? "kernel" : "stride", shapes[input], "(3)");
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
  CpuPool pool(windows, kernel.type, data[kHidden], static_cast<const float*>(data[kWeights]),
               width, kernel.temperature, pooled_data);
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
  *kernel = new (std::nothrow) Kernel{api, static_cast<const Op*>(op)->type, temperature};
  return *kernel != nullptr
             ? nullptr
             : CreateStatus::call(api, kFail, "ppllava::StridedWeightedPool: out of memory");
}

constexpr Op make_op(DataType type, int tensor_type) {
  Op op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "StridedWeightedPool"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  op.GetInputType = [](const OrtCustomOp* self, std::size_t input) {
    const int hidden = static_cast<const Op*>(self)->tensor_type;
    return input == kHidden ? hidden : input == kWeights ? kTensorFloat : kTensorInt64;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> std::size_t { return kNumInputs; };
  op.GetOutputType = [](const OrtCustomOp* self, std::size_t) {
    return static_cast<const Op*>(self)->tensor_type;
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
  op.type = type;
  op.tensor_type = tensor_type;
  return op;
}

constexpr Op kOps[] = {
    make_op(kFloat32, kTensorFloat),
    make_op(kFloat16, kTensorFloat16),
    make_op(kBFloat16, kTensorBFloat16),
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
