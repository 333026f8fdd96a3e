//! \file onnxruntime.h
//! The part of ONNX Runtime's C interface that engine_onnxruntime.cpp uses, declared here so that a compiler alone builds it.
//!
//! The interface is a table of functions to which new versions only append (onnxruntime_c_api.h, "OrtApi"): a function
//! keeps its place, and the places are all that this file needs to know.

#ifndef SSD_ONNXRUNTIME_H
#define SSD_ONNXRUNTIME_H

#include <cstddef>
#include <cstdint>

namespace ort
{
struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct Value;
struct TypeInfo;
struct TensorInfo;
struct MemoryInfo;
struct Allocator;

constexpr uint32_t kVersion = 11; //!< Of the interface: that of ONNX Runtime 1.11, kept by every later one.
constexpr int32_t kLogError = 3; //!< OrtLoggingLevel
constexpr int32_t kDeviceAllocator = 0;
constexpr int32_t kDefaultMemory = 0;

//! ONNXTensorElementDataType
enum ElementType : int32_t
{
    kFloat = 1,
    kUint8 = 2,
    kInt32 = 6,
};

//! A function that this project does not call.
using Other = void (*)();

//! OrtApi
struct Api
{
    Other other0[2];
    char const* (*getErrorMessage)(Status const*);
    Status* (*createEnv)(int32_t severity, char const* id, Env**);
    Other other4[3];
    Other other7;
    Status* (*createSessionFromArray)(Env const*, void const* model, size_t, SessionOptions const*, Session**);
    Status* (*run)(Session*, RunOptions const*, char const* const* inputNames, Value const* const* inputs, size_t,
        char const* const* outputNames, size_t, Value** outputs);
    Status* (*createSessionOptions)(SessionOptions**);
    Other other11[13];
    Status* (*setIntraOpNumThreads)(SessionOptions*, int32_t);
    Status* (*setInterOpNumThreads)(SessionOptions*, int32_t);
    Other other26[4];
    Status* (*sessionGetInputCount)(Session const*, size_t*);
    Status* (*sessionGetOutputCount)(Session const*, size_t*);
    Other other32;
    Status* (*sessionGetInputTypeInfo)(Session const*, size_t, TypeInfo**);
    Status* (*sessionGetOutputTypeInfo)(Session const*, size_t, TypeInfo**);
    Other other35;
    Status* (*sessionGetInputName)(Session const*, size_t, Allocator*, char**);
    Status* (*sessionGetOutputName)(Session const*, size_t, Allocator*, char**);
    Other other38[11];
    Status* (*createTensorWithDataAsOrtValue)(
        MemoryInfo const*, void*, size_t bytes, int64_t const* shape, size_t, ElementType, Value**);
    Other other50[5];
    Status* (*castTypeInfoToTensorInfo)(TypeInfo const*, TensorInfo const**);
    Other other56[4];
    Status* (*getTensorElementType)(TensorInfo const*, ElementType*);
    Status* (*getDimensionsCount)(TensorInfo const*, size_t*);
    Status* (*getDimensions)(TensorInfo const*, int64_t*, size_t);
    Other other63[6];
    Status* (*createCpuMemoryInfo)(int32_t allocator, int32_t memory, MemoryInfo**);
    Other other70[6];
    Status* (*allocatorFree)(Allocator*, void*);
    Other other77;
    Status* (*getAllocatorWithDefaultOptions)(Allocator**);
    Other other79[13];
    void (*releaseEnv)(Env*);
    void (*releaseStatus)(Status*);
    void (*releaseMemoryInfo)(MemoryInfo*);
    void (*releaseSession)(Session*);
    void (*releaseValue)(Value*);
    Other other97;
    void (*releaseTypeInfo)(TypeInfo*);
    Other other99;
    void (*releaseSessionOptions)(SessionOptions*);
    Other other101[29];
    Status* (*addSessionConfigEntry)(SessionOptions*, char const* key, char const* value);
};

#define SSD_AT(function, place) static_assert(offsetof(Api, function) == (place) * sizeof(Other))
SSD_AT(getErrorMessage, 2);
SSD_AT(createSessionFromArray, 8);
SSD_AT(run, 9);
SSD_AT(setIntraOpNumThreads, 24);
SSD_AT(sessionGetInputCount, 30);
SSD_AT(sessionGetInputTypeInfo, 33);
SSD_AT(sessionGetInputName, 36);
SSD_AT(createTensorWithDataAsOrtValue, 49);
SSD_AT(castTypeInfoToTensorInfo, 55);
SSD_AT(getTensorElementType, 60);
SSD_AT(createCpuMemoryInfo, 69);
SSD_AT(allocatorFree, 76);
SSD_AT(getAllocatorWithDefaultOptions, 78);
SSD_AT(releaseEnv, 92);
SSD_AT(releaseTypeInfo, 98);
SSD_AT(releaseSessionOptions, 100);
SSD_AT(addSessionConfigEntry, 130);
#undef SSD_AT

//! OrtApiBase
struct ApiBase
{
    Api const* (*getApi)(uint32_t version);
    char const* (*getVersionString)();
};
} // namespace ort

#endif // SSD_ONNXRUNTIME_H
