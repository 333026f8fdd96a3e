//! \file other_plugin.cpp
//! Another plugin library, with the same entry points and C++ names as libssd_nms.so. It creates nothing.

#include <NvInfer.h>

namespace ssd_nms
{

using namespace nvinfer1;

#if NV_TENSORRT_MAJOR >= 10
using CreatorInterface = IPluginCreatorInterface;

class SsdNmsCreator : public IPluginCreatorV3One
{
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const*, TensorRTPhase) noexcept override
    {
        return nullptr;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return "";
    }
#else
using CreatorInterface = IPluginCreator;

class SsdNmsCreator : public IPluginCreator
{
    IPluginV2* createPlugin(AsciiChar const*, PluginFieldCollection const*) noexcept override
    {
        return nullptr;
    }

    IPluginV2* deserializePlugin(AsciiChar const*, void const*, size_t) noexcept override
    {
        return nullptr;
    }

    void setPluginNamespace(AsciiChar const*) noexcept override
    {
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return "";
    }
#endif

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        static PluginFieldCollection const kNone{};
        return &kNone;
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return "Other";
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return "1";
    }
} gCreator;

CreatorInterface* const gCreators[] = {&gCreator};

} // namespace ssd_nms

extern "C" __attribute__((visibility("default"))) ssd_nms::CreatorInterface* const* getCreators(int32_t& count)
{
    count = 1;
    return ssd_nms::gCreators;
}

extern "C" __attribute__((visibility("default"))) ssd_nms::CreatorInterface* const* getPluginCreators(int32_t& count)
{
    return getCreators(count);
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder*)
{
}
