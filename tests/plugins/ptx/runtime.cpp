//! \file runtime.cpp
//! Stands in for libcudart, so that host code that nvcc compiled launches its kernels unchanged; and the interface by
//! which tests load a module, say what memory there is, and read what was found and counted.

#include "machine.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <sstream>

namespace
{

using namespace ptx;

constexpr int32_t kSuccess = 0;
constexpr int32_t kInvalidConfiguration = 9;
constexpr int32_t kInvalidFunction = 98;
constexpr int32_t kNoDevice = 100;
constexpr int32_t kLaunchFailure = 719;
constexpr uint64_t kMostShared = 48 * 1024;
constexpr uint32_t kMostThreads = 1024;

struct Dimensions
{
    uint32_t x;
    uint32_t y;
    uint32_t z;
};

//! cudaLaunchConfig_t
struct LaunchConfig
{
    Dimensions grid;
    Dimensions block;
    size_t sharedBytes;
    void* stream;
    void* attributes;
    uint32_t attributeCount;
};

World gWorld;
std::map<void const*, std::string> gFunctions; //!< By the host's stub.
LaunchConfig gPushed;
int32_t gLastError = kSuccess;
std::string gText; //!< What the last function returned that returns text.

//! A kernel's name without what makes names of an anonymous namespace unique.
std::string plainName(std::string const& name)
{
    size_t begin = name.find("_GLOBAL__N_");
    if (begin == std::string::npos)
    {
        return name;
    }
    while (begin > 0 && std::isdigit(static_cast<unsigned char>(name[begin - 1])) != 0)
    {
        --begin;
    }
    size_t digits = 0;
    size_t const length = std::stoul(name.substr(begin), &digits);
    return name.substr(begin + digits + length);
}

Kernel const& kernelOf(std::string const& name)
{
    auto const& kernels = gWorld.module.kernels;
    auto const found = std::find_if(kernels.begin(), kernels.end(),
        [&](Kernel const& kernel) { return plainName(kernel.name) == plainName(name); });
    if (found == kernels.end())
    {
        throw std::runtime_error("no PTX for " + name);
    }
    return *found;
}

void run(Kernel const& kernel, LaunchConfig const& config, uint8_t const* parameters)
{
    if (kernel.mostThreads != 0 && config.block.x > kernel.mostThreads)
    {
        throw std::runtime_error("more threads than .maxntid");
    }
    ++gWorld.launchCount;
    gWorld.counters[kernel.name].resize(kernel.code.size());
    gWorld.launches.push_back(Launch{&kernel, config.grid.x, config.block.x, config.sharedBytes, 0, 0, {}, {}});
    std::vector<uint32_t> order(config.grid.x);
    for (uint32_t i = 0; i < order.size(); ++i)
    {
        order[i] = i;
    }
    if (gWorld.settings.order != Order::kLOCKSTEP)
    {
        std::mt19937_64 random{gWorld.settings.seed * 7919 + gWorld.launchCount};
        std::shuffle(order.begin(), order.end(), random);
    }
    for (uint32_t const index : order)
    {
        Block{gWorld, kernel, gWorld.launches.back(), parameters, index}.run();
    }
    gWorld.blockCount += config.grid.x + 1;
}

int32_t launch(void const* function, LaunchConfig const& config, void** arguments)
{
    auto const fail = [](int32_t code, std::string const& what)
    {
        gWorld.error = what;
        return gLastError = code;
    };
    auto const found = gFunctions.find(function);
    if (found == gFunctions.end())
    {
        return fail(kInvalidFunction, "unknown function");
    }
    bool const isFlat = config.grid.y == 1 && config.grid.z == 1 && config.block.y == 1 && config.block.z == 1;
    bool const fits = config.grid.x >= 1 && config.grid.x <= INT32_MAX && config.block.x >= 1
        && config.block.x <= kMostThreads && config.sharedBytes <= kMostShared;
    if (!isFlat || !fits)
    {
        return fail(kInvalidConfiguration, "bad configuration");
    }
    try
    {
        run(kernelOf(found->second), config, static_cast<uint8_t const*>(arguments[0]));
    }
    catch (std::exception const& error)
    {
        return fail(kLaunchFailure, error.what());
    }
    return kSuccess;
}

std::string quoted(std::string const& text)
{
    std::string result = "\"";
    for (char const c : text)
    {
        result += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c == '\t' ? ' ' : c};
    }
    return result + '"';
}

//! "[a,b,...]" of what write(item) gives.
template <typename Items, typename Write>
std::string listOf(Items const& items, Write write)
{
    std::string text;
    for (auto const& item : items)
    {
        text += (text.empty() ? "" : ",") + write(item);
    }
    return "[" + text + "]";
}

std::string numbers(std::initializer_list<double> values)
{
    std::ostringstream text;
    text.precision(17);
    char const* separator = "[";
    for (double const value : values)
    {
        text << separator << value;
        separator = ",";
    }
    return text.str() + "]";
}

double sectorsOf(std::vector<bool> const& sectors)
{
    return static_cast<double>(std::count(sectors.begin(), sectors.end(), true));
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Names and parameters are those of libcudart.
EXPORTED void** __cudaRegisterFatBinary(void* /* binary */)
{
    static void* handle;
    return &handle;
}

EXPORTED void __cudaRegisterFatBinaryEnd(void** /* handle */)
{
}

EXPORTED void __cudaUnregisterFatBinary(void** /* handle */)
{
}

EXPORTED void __cudaRegisterFunction(void** /* handle */, char const* host, char* /* deviceFunction */,
    char const* name, int32_t /* limit */, void* /* tid */, void* /* bid */, void* /* bDim */, void* /* gDim */,
    int32_t* /* warpSize */)
{
    gFunctions[host] = name;
}

EXPORTED char __cudaInitModule(void** /* handle */)
{
    return 1;
}

EXPORTED uint32_t __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t sharedBytes, void* stream)
{
    gPushed = LaunchConfig{grid, block, sharedBytes, stream, nullptr, 0};
    return kSuccess;
}

EXPORTED int32_t __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* sharedBytes, void** stream)
{
    *grid = gPushed.grid;
    *block = gPushed.block;
    *sharedBytes = gPushed.sharedBytes;
    *stream = gPushed.stream;
    return kSuccess;
}

EXPORTED int32_t cudaLaunchKernel(
    void const* function, Dimensions grid, Dimensions block, void** arguments, size_t sharedBytes, void* stream)
{
    return launch(function, LaunchConfig{grid, block, sharedBytes, stream, nullptr, 0}, arguments);
}

EXPORTED int32_t __cudaLaunchKernel(
    void const* function, Dimensions grid, Dimensions block, void** arguments, size_t sharedBytes, void* stream)
{
    return cudaLaunchKernel(function, grid, block, arguments, sharedBytes, stream);
}

EXPORTED int32_t __cudaGetKernel(void const** kernel, void const* function)
{
    *kernel = function;
    return kSuccess;
}

EXPORTED int32_t cudaLaunchKernelExC(LaunchConfig const* config, void const* function, void** arguments)
{
    return launch(function, *config, arguments);
}

EXPORTED int32_t __cudaLaunchKernelExC(LaunchConfig const* config, void const* function, void** arguments)
{
    return launch(function, *config, arguments);
}

EXPORTED char const* cudaGetErrorName(int32_t error)
{
    return error == kSuccess ? "cudaSuccess" : "an error of the interpreter";
}

EXPORTED char const* cudaGetErrorString(int32_t error)
{
    return cudaGetErrorName(error);
}

EXPORTED int32_t cudaGetDevice(int32_t* /* device */)
{
    return kNoDevice;
}

EXPORTED int32_t cudaGetDeviceProperties(void* /* properties */, int32_t /* device */)
{
    return kNoDevice;
}

EXPORTED int32_t cudaGetLastError()
{
    int32_t const error = gLastError;
    gLastError = kSuccess;
    return error;
}

//! \param isReordered as an assembler might, for the timing model.
//! \return what is wrong with the file, or an empty text.
EXPORTED char const* ptxLoad(char const* path, int32_t isReordered)
{
    gText.clear();
    try
    {
        std::ifstream file{path};
        std::stringstream text;
        text << file.rdbuf();
        gWorld = World{};
        gWorld.module = parse(text.str());
        for (Kernel& kernel : gWorld.module.kernels)
        {
            if (isReordered != 0)
            {
                reorder(kernel);
            }
        }
    }
    catch (std::exception const& error)
    {
        gText = error.what();
    }
    return gText.c_str();
}

EXPORTED void ptxSet(
    int32_t order, uint64_t seed, int32_t burst, int32_t subset, int32_t hasTiming, int32_t hasChecks, uint64_t most)
{
    gWorld.settings = Settings{static_cast<Order>(order), seed, burst, subset, hasTiming != 0, hasChecks != 0, most};
}

//! Forgets the memory, the findings and the counters of the launches before.
EXPORTED void ptxReset()
{
    gWorld.allocations.clear();
    gWorld.findings.clear();
    gWorld.counters.clear();
    gWorld.launches.clear();
    gWorld.error.clear();
}

EXPORTED void ptxRegister(uint64_t base, uint64_t size, int32_t isReadOnly, char const* name)
{
    Allocation allocation{base, size, isReadOnly != 0, name, {}, {}, {}};
    allocation.shadows.resize(isReadOnly != 0 || !gWorld.settings.hasChecks ? 0 : size / 4 + 2);
    allocation.sectorsRead.resize(size / 32 + 2);
    allocation.sectorsWritten.resize(size / 32 + 2);
    gWorld.allocations.push_back(std::move(allocation));
}

EXPORTED char const* ptxError()
{
    return gWorld.error.c_str();
}

//! A line for each finding: how often, what and where, and the first one.
EXPORTED char const* ptxFindings()
{
    gText.clear();
    for (auto const& entry : gWorld.findings)
    {
        gText += std::to_string(entry.second.count) + " x " + entry.first + " | " + entry.second.first + "\n";
    }
    return gText.c_str();
}

//! Launches, intervals between barriers, counters by instruction, and sectors of memory touched, as JSON.
EXPORTED char const* ptxReport()
{
    auto const writeInterval = [](Interval const& each)
    {
        return numbers({static_cast<double>(each.barrier), each.cycles, static_cast<double>(each.issues),
            static_cast<double>(each.mostOfWarp)});
    };
    auto const writeLaunch = [&](Launch const& each)
    {
        return "{\"kernel\":" + quoted(each.kernel->name) + ",\"blocks\":" + std::to_string(each.blocks)
            + ",\"threads\":" + std::to_string(each.threads) + ",\"shared_bytes\":" + std::to_string(each.sharedBytes)
            + ",\"issues\":" + std::to_string(each.issues) + ",\"barriers\":" + std::to_string(each.barriers)
            + ",\"block_cycles\":" + listOf(each.blockCycles, [](double cycles) { return std::to_string(cycles); })
            + ",\"intervals\":" + listOf(each.intervals, writeInterval) + "}";
    };
    auto const writeKernel = [&](auto const& entry)
    {
        std::vector<Instruction> const& code = kernelOf(entry.first).code;
        std::vector<size_t> used;
        for (size_t i = 0; i < code.size(); ++i)
        {
            if (entry.second[i].issues != 0)
            {
                used.push_back(i);
            }
        }
        auto const writeInstruction = [&](size_t i)
        {
            Counter const& counter = entry.second[i];
            return "{\"pc\":" + std::to_string(i) + ",\"text\":" + quoted(code[i].text) + ",\"file\":"
                + quoted(gWorld.module.files[code[i].place.file]) + ",\"line\":" + std::to_string(code[i].place.line)
                + ",\"caller\":" + std::to_string(code[i].place.callerLine) + ",\"counts\":"
                + numbers({static_cast<double>(counter.issues), static_cast<double>(counter.lanes),
                    static_cast<double>(counter.requests), static_cast<double>(counter.wavefronts),
                    static_cast<double>(counter.sectors), counter.stall})
                + "}";
        };
        return "{\"kernel\":" + quoted(entry.first) + ",\"instructions\":" + listOf(used, writeInstruction) + "}";
    };
    auto const writeMemory = [](Allocation const& each)
    {
        return "{\"name\":" + quoted(each.name)
            + ",\"sectors\":" + numbers({sectorsOf(each.sectorsRead), sectorsOf(each.sectorsWritten)}) + "}";
    };
    gText = "{\"launches\":" + listOf(gWorld.launches, writeLaunch) + ",\"kernels\":"
        + listOf(gWorld.counters, writeKernel) + ",\"memory\":" + listOf(gWorld.allocations, writeMemory) + "}";
    return gText.c_str();
}
