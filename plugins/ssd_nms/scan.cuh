//! \file scan.cuh
//! The largest of a run of logits, which is all that is ever looked at of most anchors.

#ifndef SSD_NMS_SCAN_CUH
#define SSD_NMS_SCAN_CUH

#include "numerics.h"

#include <cuda_runtime.h>

namespace ssd_nms
{
namespace
{

//! How numbers are counted: 32 bits where they are known to be few.
template <bool kAreFew>
struct IndexOf
{
    using Type = int64_t;
};

template <>
struct IndexOf<true>
{
    using Type = int32_t;
};

//! The largest of `most` and this lane's share of base[begin] to base[end - 1]; a NaN counts as nothing.
//! \param base is aligned to 16 bytes.
//! \tparam kLanes share the numbers.
template <int32_t kLanes, typename Index>
__device__ __forceinline__ float largest(float const* base, Index begin, Index end, int32_t lane, float most)
{
#pragma unroll 4
    for (Index i = begin + lane; i < end; i += kLanes)
    {
        most = fmaxf(most, base[i]);
    }
    return most;
}

//! Two halves at once.
struct HalfPair
{
    uint32_t bits;
};

__device__ __forceinline__ Half lowOf(HalfPair pair)
{
    return Half{static_cast<uint16_t>(pair.bits & 0xFFFFU)};
}

__device__ __forceinline__ Half highOf(HalfPair pair)
{
    return Half{static_cast<uint16_t>(pair.bits >> 16)};
}

//! The same for halves, in pairs, begin < end.
template <int32_t kLanes, typename Index>
__device__ __forceinline__ float largest(Half const* base, Index begin, Index end, int32_t lane, float most)
{
    auto const* const pairs = reinterpret_cast<HalfPair const*>(base);
    Index const lastPair = end >> 1;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    HalfPair mostPair{0xFC00FC00U}; // twice minus infinity
#pragma unroll 4
    for (Index i = ((begin + 1) >> 1) + lane; i < lastPair; i += kLanes)
    {
        asm("max.f16x2 %0, %1, %2;" : "=r"(mostPair.bits) : "r"(mostPair.bits), "r"(pairs[i].bits));
    }
    most = fmaxf(most, fmaxf(toFloat(lowOf(mostPair)), toFloat(highOf(mostPair))));
#else
#pragma unroll 4
    for (Index i = ((begin + 1) >> 1) + lane; i < lastPair; i += kLanes)
    {
        most = fmaxf(most, fmaxf(toFloat(lowOf(pairs[i])), toFloat(highOf(pairs[i]))));
    }
#endif
    // What is not of a whole pair: the first, the last.
    if (lane == 0 && (begin & 1) != 0)
    {
        most = fmaxf(most, toFloat(base[begin]));
    }
    if (lane == kLanes - 1 && (end & 1) != 0)
    {
        most = fmaxf(most, toFloat(base[end - 1]));
    }
    return most;
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_SCAN_CUH
