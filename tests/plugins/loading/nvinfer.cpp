//! \file nvinfer.cpp
//! Stands in for TensorRT's library, where only its headers are: plugin registry and global logger.
//!
//! loadLibrary() does what the headers and NVIDIA's notes on plugin libraries say: it opens the library, gives it a
//! logger finder, registers the creators that it returns, and fails where one is registered already.

#include <NvInfer.h>

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

class Finder : public ILoggerFinder
{
public:
    ILogger* findLogger() override
    {
        return mLogger;
    }

    ILogger* mLogger{nullptr};
} gFinder;

ILogger* gLogger{nullptr};

char const* nameOf(IPluginCreatorInterface const& creator)
{
    return static_cast<IPluginCreatorV3One const&>(creator).getPluginName();
}

struct Library
{
    void* handle;
    std::vector<IPluginCreatorInterface*> creators;
};

class Registry : public IPluginRegistry
{
public:
    PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override
    {
        void* const handle = dlopen(path, RTLD_LAZY | RTLD_LOCAL);
        if (handle == nullptr)
        {
            return nullptr;
        }
        auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
        auto const get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
        auto library = std::make_unique<Library>(Library{handle, {}});
        bool isGood = setFinder != nullptr && get != nullptr;
        if (isGood)
        {
            setFinder(&gFinder);
            int32_t count = 0;
            IPluginCreatorInterface* const* const creators = get(count);
            for (int32_t i = 0; isGood && i < count; ++i)
            {
                isGood = registerCreator(*creators[i], "");
                if (isGood)
                {
                    library->creators.push_back(creators[i]);
                }
            }
        }
        if (!isGood)
        {
            unload(*library);
            return nullptr;
        }
        mLibraries.push_back(std::move(library));
        return mLibraries.back().get();
    }

    void deregisterLibrary(PluginLibraryHandle handle) noexcept override
    {
        unload(*static_cast<Library*>(handle));
    }

    bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const space) noexcept override
    {
        if (getCreator(nameOf(creator), "1", space) != nullptr)
        {
            return false;
        }
        mCreators.push_back(&creator);
        return true;
    }

    bool deregisterCreator(IPluginCreatorInterface const& creator) noexcept override
    {
        auto const at = std::find(mCreators.begin(), mCreators.end(), &creator);
        if (at == mCreators.end())
        {
            return false;
        }
        mCreators.erase(at);
        return true;
    }

    IPluginCreatorInterface* getCreator(
        AsciiChar const* name, AsciiChar const*, AsciiChar const* = "") noexcept override
    {
        for (IPluginCreatorInterface* const creator : mCreators)
        {
            if (std::strcmp(nameOf(*creator), name) == 0)
            {
                return creator;
            }
        }
        return nullptr;
    }

    IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override
    {
        *count = static_cast<int32_t>(mCreators.size());
        return mCreators.data();
    }

    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept override
    {
        return getAllCreators(count);
    }

#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override
    {
        return false;
    }

    bool deregisterCreator(IPluginCreator const&) noexcept override
    {
        return false;
    }

    IPluginCreator* const* getPluginCreatorList(int32_t* const count) const noexcept override
    {
        *count = 0;
        return nullptr;
    }

    IPluginCreator* getPluginCreator(
        AsciiChar const* const, AsciiChar const* const, AsciiChar const* const) noexcept override
    {
        return nullptr;
    }
#endif

    void setErrorRecorder(IErrorRecorder* const) noexcept override
    {
    }

    IErrorRecorder* getErrorRecorder() const noexcept override
    {
        return nullptr;
    }

    bool isParentSearchEnabled() const override
    {
        return true;
    }

    void setParentSearchEnabled(bool const) override
    {
    }

    IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override
    {
        return nullptr;
    }

    int32_t releasePluginResource(AsciiChar const*) noexcept override
    {
        return -1;
    }

private:
    void unload(Library& library) noexcept
    {
        for (IPluginCreatorInterface* const creator : library.creators)
        {
            deregisterCreator(*creator);
        }
        library.creators.clear();
        dlclose(library.handle);
    }

    std::vector<IPluginCreatorInterface*> mCreators;
    std::vector<std::unique_ptr<Library>> mLibraries;
};

} // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept
{
    static Registry registry;
    return &registry;
}

extern "C" ILogger* getLogger() noexcept
{
    return gLogger;
}

extern "C" int32_t getInferLibVersion() noexcept
{
    return NV_TENSORRT_VERSION;
}

//! \param finders, global what the logger finder and getLogger() give from now on.
extern "C" void standInLoggers(ILogger* finders, ILogger* global)
{
    gFinder.mLogger = finders;
    gLogger = global;
}
