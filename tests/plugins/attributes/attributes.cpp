//! \file attributes.cpp
//! What the TensorRT plugin says of its attributes, and what it makes of a given one, for a test that holds no
//! TensorRT.

#include "tensorrt/attributes.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" nvinfer1::ILogger* getLogger() noexcept
{
    return nullptr;
}

EXPORTED char const* pluginName()
{
    return ssd_nms::kName;
}

EXPORTED char const* pluginVersion()
{
    return ssd_nms::kVersion;
}

EXPORTED int32_t attributeCount()
{
    return ssd_nms::announcedFields()->nbFields;
}

//! \return the field that the creator announces; its data is the default.
EXPORTED nvinfer1::PluginField const* attribute(int32_t index)
{
    return ssd_nms::announcedFields()->fields + index;
}

//! What the plugin makes of these attributes.
//! \param message receives why they are refused.
//! \return whether they are taken; then `params` is filled.
EXPORTED bool readAttributes(
    nvinfer1::PluginField const* fields, int32_t count, SsdNmsParams* params, char* message, size_t messageSize)
{
    nvinfer1::PluginFieldCollection const collection{count, fields};
    try
    {
        *params = ssd_nms::paramsFrom(&collection);
        return true;
    }
    catch (std::exception const& error)
    {
        std::snprintf(message, messageSize, "%s", error.what());
        return false;
    }
}
