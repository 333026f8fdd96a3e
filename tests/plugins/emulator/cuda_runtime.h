//! \file cuda_runtime.h
//! Stands in for CUDA's header of this name, so that a host compiler can build a .cu file and run its kernels on a CPU.
//!
//! Each thread of a block is a fiber that runs until it reaches a barrier or a warp operation; the next one to run is
//! chosen by the schedule: first to last, last to first, or at random. A result that depends on the schedule shows a
//! missing barrier; a barrier that not every thread reaches ends the program with a message. Shared memory starts with
//! arbitrary content and has a guard behind it. Only what ssd_nms/kernels.cu uses is here.

#ifndef EMULATOR_CUDA_RUNTIME_H
#define EMULATOR_CUDA_RUNTIME_H

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SSD_NMS_DYNAMIC_SHARED(name) unsigned char* const name = emulator::sharedMemory()

struct dim3
{
    dim3(uint32_t xCount = 1)
        : x{xCount}
    {
    }

    uint32_t x;
};

struct alignas(16) uint4
{
    uint32_t x, y, z, w;
};

struct alignas(16) int4
{
    int32_t x, y, z, w;
};

using cudaStream_t = void*;

enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorJitCompilerNotFound = 221,
    cudaErrorUnsupportedPtxVersion = 222,
    cudaErrorLaunchFailure = 719,
};

struct cudaDeviceProp
{
    char name[256];
    int major;
    int minor;
};

struct cudaLaunchConfig_t
{
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes{0};
    cudaStream_t stream{nullptr};
};

extern dim3 threadIdx;
extern dim3 blockIdx;

namespace emulator
{

unsigned char* sharedMemory();
void runGrid(cudaLaunchConfig_t const& config, std::function<void()> const& kernel);
void blockBarrier();

//! Waits for the lanes of the mask, gives each this lane's value, and returns theirs.
//! What the next launch is refused with, or cudaSuccess.
cudaError_t refusal();
uint64_t const* exchange(uint32_t mask, uint64_t value);
int32_t lane();

template <typename T>
uint64_t toSlot(T value)
{
    static_assert(sizeof(T) <= sizeof(uint64_t), "fits a slot");
    uint64_t slot = 0;
    std::memcpy(&slot, &value, sizeof(T));
    return slot;
}

template <typename T>
T fromSlot(uint64_t slot)
{
    T value;
    std::memcpy(&value, &slot, sizeof(T));
    return value;
}

} // namespace emulator

// Errors of the device that is not there: those that a test asked for.

cudaError_t cudaGetLastError();
char const* cudaGetErrorName(cudaError_t error);
char const* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device);

template <typename Argument, typename Actual>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Argument), Actual const& argument)
{
    if (cudaError_t const error = emulator::refusal(); error != cudaSuccess)
    {
        return error;
    }
    emulator::runGrid(*config, [&] { kernel(argument); });
    return cudaSuccess;
}

inline void __syncthreads()
{
    emulator::blockBarrier();
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int32_t laneMask)
{
    return emulator::fromSlot<T>(emulator::exchange(mask, emulator::toSlot(value))[emulator::lane() ^ laneMask]);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta)
{
    uint64_t const* const slots = emulator::exchange(mask, emulator::toSlot(value));
    int32_t const source = emulator::lane() - static_cast<int32_t>(delta);
    return source >= 0 ? emulator::fromSlot<T>(slots[source]) : value;
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int32_t source)
{
    return emulator::fromSlot<T>(emulator::exchange(mask, emulator::toSlot(value))[source]);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate)
{
    uint64_t const* const slots = emulator::exchange(mask, predicate ? 1 : 0);
    uint32_t votes = 0;
    for (uint32_t i = 0; i < 32; ++i)
    {
        votes |= (mask >> i & 1U) != 0 && slots[i] != 0 ? 1U << i : 0U;
    }
    return votes;
}

template <typename T>
T atomicAdd(T* address, T value)
{
    T const before = *address; // one fiber runs at a time
    *address += value;
    return before;
}

template <typename T>
T atomicMin(T* address, T value)
{
    T const before = *address;
    *address = value < before ? value : before;
    return before;
}

inline int32_t __ffs(int32_t value)
{
    return __builtin_ffs(value);
}

inline int32_t __clzll(long long value)
{
    return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}

inline int32_t __popcll(unsigned long long value)
{
    return __builtin_popcountll(value);
}

#endif // EMULATOR_CUDA_RUNTIME_H
