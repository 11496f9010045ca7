// The few declarations of ONNX Runtime's C interface that the custom op needs, written here because
// no package of the registries carries ONNX Runtime's headers.
//
// That interface never changes: OrtApi is a table of functions to which each release only appends,
// and a caller asks for the table by the version whose entries it uses. Version 17 (ONNX Runtime
// 1.17) is the first with all of these, the last of them KernelContext_ParallelFor; every later
// release hands it out. Numbers are the entries' places in the table of the public header.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version);  // null for a version it does not know
  const char* (*GetVersionString)();
};

// Version 17 of the structure ends here; ONNX Runtime reads no more of it than `version` tells.
struct OrtCustomOp {
  std::uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, std::size_t);
  std::size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, std::size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, std::size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

namespace ppllava::ort {

constexpr std::uint32_t kApiVersion = 17;

// ONNXTensorElementDataType, OrtErrorCode, OrtCustomOpInputOutputCharacteristic, OrtMemType
constexpr int kTensorFloat = 1, kTensorInt8 = 3, kTensorInt64 = 7, kTensorFloat16 = 10,
              kTensorBFloat16 = 16;
constexpr int kFail = 1, kInvalidArgument = 2;
constexpr int kRequired = 0;
constexpr int kDefaultMemory = 0;

// One entry of the table, with its signature: `GetDimensionsCount::call(api, info, &count)`.
template <std::size_t kIndex, typename Signature>
struct Entry;

template <std::size_t kIndex, typename Result, typename... Arguments>
struct Entry<kIndex, Result(Arguments...)> {
  static Result call(const OrtApi* api, Arguments... arguments) {
    using Any = void (*)();
    const Any entry = reinterpret_cast<const Any*>(api)[kIndex];
    return reinterpret_cast<Result (*)(Arguments...)>(entry)(arguments...);
  }
};

using CreateStatus = Entry<0, OrtStatus*(int code, const char* message)>;
using CreateCustomOpDomain = Entry<26, OrtStatus*(const char* domain, OrtCustomOpDomain**)>;
using CustomOpDomainAdd = Entry<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Entry<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Entry<51, OrtStatus*(OrtValue*, void**)>;
using GetDimensionsCount = Entry<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::size_t*)>;
using GetDimensions =
    Entry<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t)>;
using GetTensorTypeAndShape = Entry<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelInfoGetAttributeFloat =
    Entry<85, OrtStatus*(const OrtKernelInfo*, const char* name, float*)>;
using KernelContextGetInput =
    Entry<90, OrtStatus*(const OrtKernelContext*, std::size_t, const OrtValue**)>;
using KernelContextGetOutput = Entry<91, OrtStatus*(OrtKernelContext*, std::size_t,
                                                    const std::int64_t*, std::size_t, OrtValue**)>;
using ReleaseTensorTypeAndShapeInfo = Entry<99, void(OrtTensorTypeAndShapeInfo*)>;
using KernelContextParallelFor =
    Entry<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, std::size_t),
                          std::size_t total, std::size_t num_batch, void*)>;

}  // namespace ppllava::ort
