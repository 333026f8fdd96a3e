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

#include <dlfcn.h>

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

#if NV_TENSORRT_MAJOR >= 10
using CreatorInterface = IPluginCreatorInterface;
#else
using CreatorInterface = IPluginCreator;
#endif

char const gSelf = 0; //!< An address in this library.

//! The creator, registered while the library is loaded: all that LD_PRELOAD, dlopen() and Triton's `plugins` need.
class Registration
{
public:
    Registration()
        : mIsRegistered{getPluginRegistry() != nullptr && registry().registerCreator(mCreator, "")}
    {
        if (mIsRegistered && !isRegistryKnown()) // it stays there, so its code must stay, too
        {
            Dl_info self{};
            if (dladdr(&gSelf, &self) != 0 && self.dli_fname != nullptr)
            {
                static_cast<void>(dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE));
            }
        }
    }

    Registration(Registration const&) = delete;
    Registration& operator=(Registration const&) = delete;

    //! The registry must not keep a creator whose code dlclose() unmaps.
    ~Registration()
    {
        withdraw();
    }

    //! Takes the creator out of the registry, if it was this library that put it there.
    void withdraw() noexcept
    {
        if (mIsRegistered && isRegistryKnown())
        {
            mIsRegistered = false;
            registry().deregisterCreator(mCreator);
        }
    }

    bool isRegistered() const noexcept
    {
        return mIsRegistered;
    }

    //! Whether the registry's interface is the headers': until 8 it changed even from 8.6.0 to 8.6.1, behind its first
    //! functions, so that a call of deregisterCreator() would end in another one.
    static bool isRegistryKnown() noexcept
    {
        return NV_TENSORRT_MAJOR >= 10 || getInferLibVersion() == NV_TENSORRT_VERSION;
    }

    CreatorInterface* creator() noexcept
    {
        return &mCreator;
    }

private:
    static IPluginRegistry& registry() noexcept
    {
        return *getPluginRegistry();
    }

    SsdNmsCreator mCreator;
    bool mIsRegistered;
};

Registration gRegistration;

//! The creators for IPluginRegistry::loadLibrary(), which registers them itself and fails where they are registered
//! already. So what the load of this library registered is taken back first.
CreatorInterface* const* creatorsToRegister(int32_t& count) noexcept
{
    static CreatorInterface* const kCreators[] = {gRegistration.creator()};
    gRegistration.withdraw();
    if (gRegistration.isRegistered())
    {
        logError(
            "this library was built with the headers of another TensorRT of the same major version, which has another "
            "plugin registry: build it with this one's, or load it with dlopen() or LD_PRELOAD");
    }
    count = 1;
    return kCreators;
}

} // namespace
} // namespace ssd_nms

// What TensorRT looks up in a library that it loads itself: loadLibrary(), trtexec --dynamicPlugins, and a plan that
// holds the library (setPluginsToSerialize).

#if NV_TENSORRT_MAJOR >= 10
extern "C" SSD_NMS_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept;

nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) noexcept
{
    return ssd_nms::creatorsToRegister(nbCreators);
}
#else
extern "C" SSD_NMS_API nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) noexcept;

nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& nbCreators) noexcept
{
    return ssd_nms::creatorsToRegister(nbCreators);
}
#endif

//! \param finder finds the logger of the engine or context that calls a plugin; it must live as long as the plugins.
//! The last one given counts; null: TensorRT's global logger again.
extern "C" SSD_NMS_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    ssd_nms::gLoggerFinder.store(finder);
}
