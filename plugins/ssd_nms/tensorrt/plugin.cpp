//! \file plugin.cpp
//! SSDNMS as a TensorRT plugin: IPluginV3 where TensorRT has it (10 and later), IPluginV2DynamicExt for 8.6.
//!
//! Both adapters are thin: attributes, formats, shapes and messages are shared, the work is ssd_nms.h's.

#include <NvInferVersion.h>

#if NV_TENSORRT_MAJOR >= 10
#include "adapter_v3.h"
#else
#include "adapter_v2.h"
#endif

#define SSD_NMS_TEXT_OF(value) #value
#define SSD_NMS_TEXT(value) SSD_NMS_TEXT_OF(value)

//! What this library is: a line of JSON behind a marker, so that tools find it in the file without loading it, too.
//! \return the JSON; the memory belongs to the library.
extern "C" SSD_NMS_API char const* ssdNmsPluginInfo() noexcept;

char const* ssdNmsPluginInfo() noexcept
{
    static constexpr char kMarker[] = "SSD_NMS_PLUGIN_INFO:";
    static constexpr char kInfo[] =
        "SSD_NMS_PLUGIN_INFO:{\"plugin\": \"SSDNMS\", \"plugin_version\": \"1\", \"version\": \"" SSD_NMS_VERSION
        "\", \"tensorrt\": \"" SSD_NMS_TEXT(NV_TENSORRT_MAJOR) "." SSD_NMS_TEXT(NV_TENSORRT_MINOR) "." SSD_NMS_TEXT(
            NV_TENSORRT_PATCH) "\", \"cuda\": \"" SSD_NMS_CUDA_VERSION "\", \"architectures\": \"" SSD_NMS_ARCHITECTURES
                               "\", \"git\": \"" SSD_NMS_GIT "\"}";
    return kInfo + sizeof(kMarker) - 1;
}

namespace ssd_nms
{
namespace
{

REGISTER_TENSORRT_PLUGIN(SsdNmsCreator);

} // namespace
} // namespace ssd_nms
