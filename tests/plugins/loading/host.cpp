//! \file host.cpp
//! A program that uses the SSDNMS plugin as TensorRT's users do, with TensorRT's interface alone.
//!
//!     host WAY libssd_nms.so [other_plugin.so]
//!
//! Prints each thing that is not as it should be and ends with 1, or prints "ok".

#include <NvInfer.h>

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

using namespace nvinfer1;

namespace
{

bool gPassed = true;

void expect(bool passed, char const* what)
{
    if (!passed)
    {
        std::printf("FAILED: %s\n", what);
        gPassed = false;
    }
}

#if NV_TENSORRT_MAJOR >= 10
using Creator = IPluginCreatorV3One;

Creator* find(char const* name)
{
    return static_cast<Creator*>(getPluginRegistry()->getCreator(name, "1", ""));
}

bool creates(Creator& creator, PluginFieldCollection const& fields)
{
    IPluginV3* const plugin = creator.createPlugin("nms", &fields, TensorRTPhase::kBUILD);
    bool const isThere = plugin != nullptr;
    delete plugin;
    return isThere;
}
#else
using Creator = IPluginCreator;

Creator* find(char const* name)
{
    return getPluginRegistry()->getPluginCreator(name, "1", "");
}

bool creates(Creator& creator, PluginFieldCollection const& fields)
{
    IPluginV2* const plugin = creator.createPlugin("nms", &fields);
    if (plugin != nullptr)
    {
        plugin->destroy();
    }
    return plugin != nullptr;
}
#endif

//! Whether the registered SSDNMS is there and works.
void expectSsdNms(char const* what)
{
    Creator* const creator = find("SSDNMS");
    expect(creator != nullptr, what);
    if (creator != nullptr)
    {
        PluginFieldCollection const none{0, nullptr};
        expect(std::strcmp(creator->getPluginName(), "SSDNMS") == 0, "its name");
        expect(creator->getFieldNames()->nbFields >= 10, "its attributes");
        expect(creates(*creator, none), "a plugin with every default");
    }
}

void* open(char const* path)
{
    void* const handle = dlopen(path, RTLD_LAZY | RTLD_GLOBAL);
    if (handle == nullptr)
    {
        std::printf("%s\n", dlerror());
    }
    expect(handle != nullptr, "dlopen");
    return handle;
}

void dynamicLibrary(char const* path)
{
    void* const first = open(path);
    expectSsdNms("dlopen registers it");
    dlclose(first);
    expect(find("SSDNMS") == nullptr, "dlclose takes it back");
    open(path);
    expectSsdNms("dlopen again");
}

void loadedByRegistry(char const* path)
{
    for (int32_t i = 0; i < 3; ++i)
    {
        IPluginRegistry::PluginLibraryHandle const handle = getPluginRegistry()->loadLibrary(path);
        expect(handle != nullptr, "loadLibrary");
        expectSsdNms("loadLibrary registers it");
        if (handle != nullptr)
        {
            getPluginRegistry()->deregisterLibrary(handle);
        }
        expect(find("SSDNMS") == nullptr, "deregisterLibrary takes it back");
    }
    expect(getPluginRegistry()->loadLibrary(path) != nullptr, "loadLibrary, and left to the end of the process");
}

void sideBySide(char const* path, char const* other)
{
    open(other); // its entry points are the first that a global look-up finds
    void* const handle = getPluginRegistry()->loadLibrary(path);
    expectSsdNms("beside another library");
    void* const otherHandle = getPluginRegistry()->loadLibrary(other);
    expect(otherHandle != nullptr, "the other library");
    expect(find("Other") != nullptr && std::strcmp(find("Other")->getPluginName(), "Other") == 0, "the other creator");
    getPluginRegistry()->deregisterLibrary(otherHandle);
    expectSsdNms("after the other one is gone");
    getPluginRegistry()->deregisterLibrary(handle);
    open(path);
    expectSsdNms("dlopen after the other library");
    expect(getPluginRegistry()->loadLibrary(other) != nullptr, "the other library after this one");
    expect(find("Other") != nullptr, "the other creator again");
}

class Logger : public ILogger
{
public:
    void log(Severity /* severity */, AsciiChar const* message) noexcept override
    {
        mText = message;
    }

    std::string mText;
};

class Finder : public ILoggerFinder
{
public:
    explicit Finder(Logger& logger)
        : mLogger{logger}
    {
    }

    ILogger* findLogger() override
    {
        return &mLogger;
    }

private:
    Logger& mLogger;
};

void refuse()
{
    float const threshold = 2.0F;
    PluginField const field{"score_threshold", &threshold, PluginFieldType::kFLOAT32, 1};
    PluginFieldCollection const fields{1, &field};
    Creator* const creator = find("SSDNMS");
    expect(creator != nullptr && !creates(*creator, fields), "a threshold of 2 is refused");
}

void loggers(char const* path)
{
    void* const handle = open(path);
    auto const setFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    Logger logger;
    Finder finder{logger};
    setFinder(&finder);
    refuse();
    expect(logger.mText == "[SSDNMS] score_threshold is 2, must be in [0, 1]", "the finder's logger is told why");
    logger.mText.clear();
    setFinder(nullptr);
    refuse();
    expect(logger.mText.empty(), "a finder taken back is not asked");
    // Where the library that is linked is the stand-in, TensorRT's part can be played, too.
    auto const set = reinterpret_cast<void (*)(ILogger*, ILogger*)>(dlsym(RTLD_DEFAULT, "standInLoggers"));
    if (set != nullptr)
    {
        Logger global;
        set(nullptr, &global);
        refuse();
        expect(!global.mText.empty(), "without a finder, the global logger");
        expect(getPluginRegistry()->loadLibrary(path) != nullptr, "loadLibrary of a library that is open");
        global.mText.clear();
        set(&logger, &global);
        refuse();
        expect(!logger.mText.empty() && global.mText.empty(), "after loadLibrary, the finder's logger alone");
        set(nullptr, &global);
        refuse();
        expect(!global.mText.empty(), "a finder that finds none: the global logger");
    }
}

} // namespace

int main(int count, char** arguments)
{
    std::string const way = count > 2 ? arguments[1] : "";
    char const* const path = count > 2 ? arguments[2] : "";
    if (way == "preload")
    {
        expectSsdNms("LD_PRELOAD registers it");
    }
    else if (way == "preload-and-load")
    {
        expectSsdNms("LD_PRELOAD registers it");
        expect(getPluginRegistry()->loadLibrary(path) != nullptr, "loadLibrary of a preloaded library");
        expectSsdNms("and it is there");
    }
    else if (way == "dlopen")
    {
        dynamicLibrary(path);
    }
    else if (way == "load")
    {
        loadedByRegistry(path);
    }
    else if (way == "side-by-side" && count > 3)
    {
        sideBySide(path, arguments[3]);
    }
    else if (way == "loggers")
    {
        loggers(path);
    }
    else
    {
        expect(false, "a way to load and its files are given");
    }
    std::printf("%s", gPassed ? "ok\n" : "");
    return gPassed ? 0 : 1;
}
