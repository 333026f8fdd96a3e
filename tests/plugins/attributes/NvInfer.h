//! \file NvInfer.h
//! Stands in for TensorRT's header of this name: what tensorrt/attributes.h uses of it, so it compiles without
//! TensorRT.

#ifndef ATTRIBUTES_NV_INFER_H
#define ATTRIBUTES_NV_INFER_H

#include <cstdint>
#include <vector>

#define NV_TENSORRT_MAJOR 10

namespace nvinfer1
{

enum class PluginFieldType : int32_t
{
    kFLOAT32 = 1,
    kINT32 = 5,
    kCHAR = 6,
    kINT64 = 9,
};

struct PluginField
{
    char const* name;
    void const* data;
    PluginFieldType type;
    int32_t length;
};

struct PluginFieldCollection
{
    int32_t nbFields;
    PluginField const* fields;
};

class ILogger
{
public:
    enum class Severity : int32_t
    {
        kERROR = 1,
    };

    virtual void log(Severity severity, char const* message) noexcept = 0;

protected:
    ~ILogger() = default;
};

class ILoggerFinder
{
public:
    virtual ILogger* findLogger() = 0;

protected:
    virtual ~ILoggerFinder() = default;
};

} // namespace nvinfer1

extern "C" nvinfer1::ILogger* getLogger() noexcept;

#endif // ATTRIBUTES_NV_INFER_H
