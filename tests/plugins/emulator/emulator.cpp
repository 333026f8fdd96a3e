//! \file emulator.cpp
//! Runs the blocks of a grid one after the other, the threads of a block as fibers.

#include "cuda_runtime.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <ucontext.h>
#include <vector>

dim3 threadIdx;
dim3 blockIdx;

namespace
{

constexpr uint32_t kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 256;

enum class State
{
    kREADY,
    kAT_BARRIER,
    kAT_WARP_OPERATION,
    kDONE,
};

struct Fiber
{
    ucontext_t context; //!< where it starts
    jmp_buf resume; //!< where it waits
    bool isStarted;
    std::vector<unsigned char> stack;
    State state;
    uint32_t mask;
    uint64_t value;
    uint64_t slots[kWarpSize];
};

int32_t gSchedule = 0;
std::mt19937 gRandom;
jmp_buf gScheduler;
std::vector<Fiber> gFibers;
uint32_t gCurrent;
std::vector<unsigned char> gShared;
std::function<void()> const* gKernel;

[[noreturn]] void fail(char const* what)
{
    std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    std::abort();
}

void fiberMain()
{
    (*gKernel)();
    gFibers[gCurrent].state = State::kDONE;
    _longjmp(gScheduler, 1);
}

void wait(State state)
{
    Fiber& fiber = gFibers[gCurrent];
    fiber.state = state;
    if (_setjmp(fiber.resume) == 0)
    {
        _longjmp(gScheduler, 1);
    }
}

//! Lets the threads go on that have all arrived where they wait.
void release(uint32_t threads)
{
    uint32_t atBarrier = 0;
    for (uint32_t i = 0; i < threads; ++i)
    {
        atBarrier += gFibers[i].state == State::kAT_BARRIER ? 1 : 0;
    }
    if (atBarrier == threads)
    {
        for (uint32_t i = 0; i < threads; ++i)
        {
            gFibers[i].state = State::kREADY;
        }
        return;
    }
    for (uint32_t i = 0; i < threads; ++i)
    {
        Fiber const& fiber = gFibers[i];
        if (fiber.state != State::kAT_WARP_OPERATION)
        {
            continue;
        }
        uint32_t const warp = i / kWarpSize * kWarpSize;
        uint32_t const mask = fiber.mask;
        bool isComplete = true;
        for (uint32_t lane = 0; lane < kWarpSize; ++lane)
        {
            isComplete = isComplete
                && ((mask >> lane & 1U) == 0
                    || (gFibers[warp + lane].state == State::kAT_WARP_OPERATION && gFibers[warp + lane].mask == mask));
        }
        for (uint32_t lane = 0; isComplete && lane < kWarpSize; ++lane)
        {
            if ((mask >> lane & 1U) != 0)
            {
                Fiber& member = gFibers[warp + lane];
                for (uint32_t other = 0; other < kWarpSize; ++other)
                {
                    // What a lane outside the mask would give is undefined: make it show.
                    member.slots[other] = (mask >> other & 1U) != 0 ? gFibers[warp + other].value : 0xDEADBEEFDEADBEEF;
                }
            }
        }
        for (uint32_t lane = 0; isComplete && lane < kWarpSize; ++lane)
        {
            if ((mask >> lane & 1U) != 0)
            {
                gFibers[warp + lane].state = State::kREADY;
            }
        }
    }
}

void prepare(Fiber& fiber)
{
    fiber.state = State::kREADY;
    fiber.isStarted = false;
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiberMain, 0);
}

//! Runs a fiber until it waits or ends. setjmp keeps no signal mask, so a switch is no system call.
void resume(Fiber& fiber)
{
    if (_setjmp(gScheduler) != 0)
    {
        return;
    }
    if (fiber.isStarted)
    {
        _longjmp(fiber.resume, 1);
    }
    fiber.isStarted = true;
    setcontext(&fiber.context);
}

void runBlock(uint32_t threads)
{
    for (uint32_t i = 0; i < threads; ++i)
    {
        prepare(gFibers[i]);
    }
    uint32_t done = 0;
    std::vector<uint32_t> ready;
    while (done < threads)
    {
        ready.clear();
        for (uint32_t i = 0; i < threads; ++i)
        {
            uint32_t const thread = gSchedule == 1 ? threads - 1 - i : i;
            if (gFibers[thread].state == State::kREADY)
            {
                ready.push_back(thread);
            }
        }
        if (gSchedule >= 2)
        {
            std::shuffle(ready.begin(), ready.end(), gRandom);
        }
        if (ready.empty())
        {
            fail("not every thread reaches this barrier or warp operation");
        }
        for (uint32_t const i : ready)
        {
            gCurrent = i;
            threadIdx.x = i;
            resume(gFibers[i]);
            done += gFibers[i].state == State::kDONE ? 1 : 0;
        }
        release(threads);
    }
}

} // namespace

namespace emulator
{

unsigned char* sharedMemory()
{
    return gShared.data() + (16 - reinterpret_cast<uintptr_t>(gShared.data()) % 16) % 16;
}

int32_t lane()
{
    return static_cast<int32_t>(gCurrent % kWarpSize);
}

void blockBarrier()
{
    wait(State::kAT_BARRIER);
}

uint64_t const* exchange(uint32_t mask, uint64_t value)
{
    Fiber& fiber = gFibers[gCurrent];
    if ((mask >> (gCurrent % kWarpSize) & 1U) == 0)
    {
        fail("a lane is not in the mask of its own warp operation");
    }
    fiber.mask = mask;
    fiber.value = value;
    wait(State::kAT_WARP_OPERATION);
    return fiber.slots;
}

void runGrid(cudaLaunchConfig_t const& config, std::function<void()> const& kernel)
{
    uint32_t const threads = config.blockDim.x;
    if (threads % kWarpSize != 0)
    {
        fail("whole warps only");
    }
    gKernel = &kernel;
    if (gFibers.size() < threads)
    {
        gFibers = std::vector<Fiber>(threads);
    }
    for (uint32_t block = 0; block < config.gridDim.x; ++block)
    {
        blockIdx.x = block;
        gShared.assign(config.dynamicSmemBytes + 16 + kGuardBytes, 0xA5);
        runBlock(threads);
        for (size_t i = 0; i < kGuardBytes; ++i)
        {
            if (sharedMemory()[config.dynamicSmemBytes + i] != 0xA5)
            {
                fail("the block wrote behind its shared memory");
            }
        }
    }
}

} // namespace emulator

//! \param schedule 0: first thread first, 1: last first, above: at random with this seed.
extern "C" __attribute__((visibility("default"))) void emulatorSetSchedule(int32_t schedule)
{
    gSchedule = schedule;
    gRandom.seed(static_cast<uint32_t>(schedule));
}

// Errors that a test asks for.

namespace
{

cudaError_t gRefusal = cudaSuccess;
int32_t gLaunchesBefore = 0;

} // namespace

cudaError_t emulator::refusal()
{
    return gLaunchesBefore-- > 0 ? cudaSuccess : gRefusal;
}

//! Refuses every launch but the first ones with this error; cudaSuccess: none.
extern "C" __attribute__((visibility("default"))) void emulatorRefuse(int32_t error, int32_t launchesBefore)
{
    gRefusal = static_cast<cudaError_t>(error);
    gLaunchesBefore = launchesBefore;
}

cudaError_t cudaGetLastError()
{
    return gRefusal;
}

char const* cudaGetErrorName(cudaError_t error)
{
    return error == cudaErrorNoKernelImageForDevice ? "cudaErrorNoKernelImageForDevice" : "cudaErrorOther";
}

char const* cudaGetErrorString(cudaError_t error)
{
    return error == cudaErrorNoKernelImageForDevice ? "no kernel image is available for execution on the device"
                                                    : "another error";
}

cudaError_t cudaGetDevice(int* device)
{
    *device = 3;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /* device */)
{
    *properties = cudaDeviceProp{"Emulated GPU", 8, 7};
    return cudaSuccess;
}
