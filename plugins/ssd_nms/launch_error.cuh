//! \file launch_error.cuh
//! Keeps and words the CUDA error of a failed launch. The CUDA runtime is linked statically, so nobody outside this
//! library can ask for it.

#ifndef SSD_NMS_LAUNCH_ERROR_CUH
#define SSD_NMS_LAUNCH_ERROR_CUH

#include <cuda_runtime.h>

#include <cstdio>

#ifndef SSD_NMS_ARCHITECTURES
#define SSD_NMS_ARCHITECTURES "those that it was compiled for"
#endif

namespace ssd_nms
{
namespace
{

thread_local char tLaunchError[512] = "";

//! Whether the library has no code that this device can run.
bool isMissingImage(cudaError_t error)
{
    return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
        || error == cudaErrorUnsupportedPtxVersion || error == cudaErrorJitCompilerNotFound;
}

//! "GPU 0, NVIDIA H100, of compute capability 9.0"
void nameDevice(char* text, size_t size)
{
    int device = 0;
    cudaDeviceProp properties{};
    if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess)
    {
        std::snprintf(text, size, "GPU %d, %s, of compute capability %d.%d", device, properties.name, properties.major,
            properties.minor);
    }
    else
    {
        std::snprintf(text, size, "the current GPU");
    }
}

//! Words an error for ssdNmsLastError() and takes it out of the runtime, where the next call would find it again.
void keepLaunchError(cudaError_t error, char const* kernel)
{
    int const length = std::snprintf(
        tLaunchError, sizeof(tLaunchError), "%s: %s (%s)", kernel, cudaGetErrorString(error), cudaGetErrorName(error));
    if (isMissingImage(error) && length > 0 && static_cast<size_t>(length) < sizeof(tLaunchError))
    {
        char device[320];
        nameDevice(device, sizeof(device));
        std::snprintf(tLaunchError + length, sizeof(tLaunchError) - static_cast<size_t>(length),
            "; the device is %s, the library has code for %s", device, SSD_NMS_ARCHITECTURES);
    }
    static_cast<void>(cudaGetLastError());
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_LAUNCH_ERROR_CUH
