//! \file triton.h
//! The part of Triton's backend C interface that this backend uses, declared here so that a compiler alone builds it.
//!
//! Names, order of enumerators and signatures are those of triton/core/tritonbackend.h and tritonserver.h
//! (github.com/triton-inference-server/core), which promise to keep them within one major version of the interface.

#ifndef SSD_TRITON_H
#define SSD_TRITON_H

#include <cstddef>
#include <cstdint>

extern "C"
{
    constexpr uint32_t kTritonMajor = 1;
    constexpr uint32_t kTritonMinor = 14; //!< All that is declared below is there from here on (Triton 2.37).

    enum TRITONSERVER_DataType
    {
        TRITONSERVER_TYPE_INVALID = 0,
        TRITONSERVER_TYPE_UINT8 = 2,
        TRITONSERVER_TYPE_INT32 = 8,
        TRITONSERVER_TYPE_FP32 = 11,
    };

    enum TRITONSERVER_MemoryType
    {
        TRITONSERVER_MEMORY_CPU,
        TRITONSERVER_MEMORY_CPU_PINNED,
        TRITONSERVER_MEMORY_GPU,
    };

    enum TRITONSERVER_Error_Code
    {
        TRITONSERVER_ERROR_UNKNOWN,
        TRITONSERVER_ERROR_INTERNAL,
        TRITONSERVER_ERROR_NOT_FOUND,
        TRITONSERVER_ERROR_INVALID_ARG,
        TRITONSERVER_ERROR_UNAVAILABLE,
        TRITONSERVER_ERROR_UNSUPPORTED,
        TRITONSERVER_ERROR_ALREADY_EXISTS,
        TRITONSERVER_ERROR_CANCELLED,
    };

    enum TRITONSERVER_ParameterType
    {
        TRITONSERVER_PARAMETER_STRING,
    };

    enum TRITONSERVER_MetricKind
    {
        TRITONSERVER_METRIC_KIND_COUNTER,
        TRITONSERVER_METRIC_KIND_GAUGE,
        TRITONSERVER_METRIC_KIND_HISTOGRAM,
    };

    enum TRITONSERVER_LogLevel
    {
        TRITONSERVER_LOG_INFO,
        TRITONSERVER_LOG_WARN,
        TRITONSERVER_LOG_ERROR,
    };

    enum TRITONBACKEND_ArtifactType
    {
        TRITONBACKEND_ARTIFACT_FILESYSTEM,
    };

    constexpr uint32_t kReleaseAll = 1; //!< TRITONSERVER_REQUEST_RELEASE_ALL
    constexpr uint32_t kResponseFinal = 1; //!< TRITONSERVER_RESPONSE_COMPLETE_FINAL

    struct TRITONSERVER_Error;
    struct TRITONSERVER_Message;
    struct TRITONSERVER_Metric;
    struct TRITONSERVER_MetricArgs;
    struct TRITONSERVER_MetricFamily;
    struct TRITONSERVER_Parameter;
    struct TRITONBACKEND_Backend;
    struct TRITONBACKEND_BackendAttribute;
    struct TRITONBACKEND_Model;
    struct TRITONBACKEND_ModelInstance;
    struct TRITONBACKEND_Request;
    struct TRITONBACKEND_Response;
    struct TRITONBACKEND_Input;
    struct TRITONBACKEND_Output;

    TRITONSERVER_Error* TRITONSERVER_ErrorNew(TRITONSERVER_Error_Code code, char const* message);
    void TRITONSERVER_ErrorDelete(TRITONSERVER_Error* error);
    TRITONSERVER_Error_Code TRITONSERVER_ErrorCode(TRITONSERVER_Error* error);
    char const* TRITONSERVER_ErrorMessage(TRITONSERVER_Error* error);
    TRITONSERVER_Error* TRITONSERVER_LogMessage(
        TRITONSERVER_LogLevel level, char const* file, int line, char const* message);
    TRITONSERVER_Error* TRITONSERVER_MessageSerializeToJson(
        TRITONSERVER_Message* message, char const** base, size_t* byteSize);
    TRITONSERVER_Error* TRITONSERVER_MessageDelete(TRITONSERVER_Message* message);
    TRITONSERVER_Parameter* TRITONSERVER_ParameterNew(
        char const* name, TRITONSERVER_ParameterType type, void const* value);
    void TRITONSERVER_ParameterDelete(TRITONSERVER_Parameter* parameter);
    TRITONSERVER_Error* TRITONSERVER_MetricFamilyNew(
        TRITONSERVER_MetricFamily** family, TRITONSERVER_MetricKind kind, char const* name, char const* description);
    TRITONSERVER_Error* TRITONSERVER_MetricFamilyDelete(TRITONSERVER_MetricFamily* family);
    TRITONSERVER_Error* TRITONSERVER_MetricNew(TRITONSERVER_Metric** metric, TRITONSERVER_MetricFamily* family,
        TRITONSERVER_Parameter const** labels, uint64_t count);
    TRITONSERVER_Error* TRITONSERVER_MetricDelete(TRITONSERVER_Metric* metric);
    TRITONSERVER_Error* TRITONSERVER_MetricIncrement(TRITONSERVER_Metric* metric, double value);
    //! These five came later than the rest (2.51 has them); weak, so that they are null in a server without them.
    __attribute__((weak)) TRITONSERVER_Error* TRITONSERVER_MetricArgsNew(TRITONSERVER_MetricArgs** arguments);
    __attribute__((weak)) TRITONSERVER_Error* TRITONSERVER_MetricArgsSetHistogram(
        TRITONSERVER_MetricArgs* arguments, double const* bounds, uint64_t count);
    __attribute__((weak)) TRITONSERVER_Error* TRITONSERVER_MetricArgsDelete(TRITONSERVER_MetricArgs* arguments);
    __attribute__((weak)) TRITONSERVER_Error* TRITONSERVER_MetricNewWithArgs(TRITONSERVER_Metric** metric,
        TRITONSERVER_MetricFamily* family, TRITONSERVER_Parameter const** labels, uint64_t count,
        TRITONSERVER_MetricArgs const* arguments);
    __attribute__((weak)) TRITONSERVER_Error* TRITONSERVER_MetricObserve(TRITONSERVER_Metric* metric, double value);

    TRITONSERVER_Error* TRITONBACKEND_ApiVersion(uint32_t* major, uint32_t* minor);
    TRITONSERVER_Error* TRITONBACKEND_BackendState(TRITONBACKEND_Backend* backend, void** state);
    TRITONSERVER_Error* TRITONBACKEND_BackendSetState(TRITONBACKEND_Backend* backend, void* state);
    TRITONSERVER_Error* TRITONBACKEND_BackendAttributeSetParallelModelInstanceLoading(
        TRITONBACKEND_BackendAttribute* attributes, bool enabled);

    TRITONSERVER_Error* TRITONBACKEND_ModelName(TRITONBACKEND_Model* model, char const** name);
    TRITONSERVER_Error* TRITONBACKEND_ModelVersion(TRITONBACKEND_Model* model, uint64_t* version);
    TRITONSERVER_Error* TRITONBACKEND_ModelRepository(
        TRITONBACKEND_Model* model, TRITONBACKEND_ArtifactType* type, char const** location);
    TRITONSERVER_Error* TRITONBACKEND_ModelConfig(
        TRITONBACKEND_Model* model, uint32_t configVersion, TRITONSERVER_Message** config);
    TRITONSERVER_Error* TRITONBACKEND_ModelBackend(TRITONBACKEND_Model* model, TRITONBACKEND_Backend** backend);
    TRITONSERVER_Error* TRITONBACKEND_ModelState(TRITONBACKEND_Model* model, void** state);
    TRITONSERVER_Error* TRITONBACKEND_ModelSetState(TRITONBACKEND_Model* model, void* state);

    TRITONSERVER_Error* TRITONBACKEND_ModelInstanceModel(
        TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Model** model);
    TRITONSERVER_Error* TRITONBACKEND_ModelInstanceState(TRITONBACKEND_ModelInstance* instance, void** state);
    TRITONSERVER_Error* TRITONBACKEND_ModelInstanceSetState(TRITONBACKEND_ModelInstance* instance, void* state);
    TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportStatistics(TRITONBACKEND_ModelInstance* instance,
        TRITONBACKEND_Request* request, bool success, uint64_t executionBegun, uint64_t computeBegun,
        uint64_t computeEnded, uint64_t executionEnded);
    TRITONSERVER_Error* TRITONBACKEND_ModelInstanceReportBatchStatistics(TRITONBACKEND_ModelInstance* instance,
        uint64_t batchSize, uint64_t executionBegun, uint64_t computeBegun, uint64_t computeEnded,
        uint64_t executionEnded);

    TRITONSERVER_Error* TRITONBACKEND_RequestInput(
        TRITONBACKEND_Request* request, char const* name, TRITONBACKEND_Input** input);
    TRITONSERVER_Error* TRITONBACKEND_RequestOutputCount(TRITONBACKEND_Request* request, uint32_t* count);
    TRITONSERVER_Error* TRITONBACKEND_RequestOutputName(
        TRITONBACKEND_Request* request, uint32_t index, char const** name);
    //! From Triton 2.39 on; weak, so that it is null in an older server.
    __attribute__((weak)) TRITONSERVER_Error* TRITONBACKEND_RequestIsCancelled(
        TRITONBACKEND_Request* request, bool* cancelled);
    TRITONSERVER_Error* TRITONBACKEND_RequestRelease(TRITONBACKEND_Request* request, uint32_t flags);
    TRITONSERVER_Error* TRITONBACKEND_InputProperties(TRITONBACKEND_Input* input, char const** name,
        TRITONSERVER_DataType* type, int64_t const** shape, uint32_t* dimensions, uint64_t* byteSize,
        uint32_t* bufferCount);
    TRITONSERVER_Error* TRITONBACKEND_InputBuffer(TRITONBACKEND_Input* input, uint32_t index, void const** buffer,
        uint64_t* byteSize, TRITONSERVER_MemoryType* memory, int64_t* memoryId);

    TRITONSERVER_Error* TRITONBACKEND_ResponseNew(TRITONBACKEND_Response** response, TRITONBACKEND_Request* request);
    TRITONSERVER_Error* TRITONBACKEND_ResponseOutput(TRITONBACKEND_Response* response, TRITONBACKEND_Output** output,
        char const* name, TRITONSERVER_DataType type, int64_t const* shape, uint32_t dimensions);
    TRITONSERVER_Error* TRITONBACKEND_OutputBuffer(TRITONBACKEND_Output* output, void** buffer, uint64_t byteSize,
        TRITONSERVER_MemoryType* memory, int64_t* memoryId);
    TRITONSERVER_Error* TRITONBACKEND_ResponseSend(
        TRITONBACKEND_Response* response, uint32_t flags, TRITONSERVER_Error* error);
}

#endif // SSD_TRITON_H
