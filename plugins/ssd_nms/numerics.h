//! \file numerics.h
//! The arithmetic of SSDNMS, for host and device: conversion, exp, activation, decode, IoU, and the key that orders.
//!
//! Every function gives the same bits on the GPU and on the CPU: only IEEE operations, an exp of our own instead of the
//! two platforms' different ones, and no contraction of a*b+c (-fmad=false, -ffp-contract=off). So the reference and
//! the kernels can be compared bit for bit.

#ifndef SSD_NMS_NUMERICS_H
#define SSD_NMS_NUMERICS_H

#include "ssd_nms.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SSD_NMS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SSD_NMS_HOST_DEVICE inline
#endif

namespace ssd_nms
{

//! Lanes that share one anchor's classes. Part of the numerics: a softmax's sum is that of this many partial sums.
constexpr int32_t kLanesPerAnchor = 8;

//! IEEE binary16 as stored.
struct Half
{
    uint16_t bits;
};

struct alignas(16) Box
{
    float x1;
    float y1;
    float x2;
    float y2;
};

SSD_NMS_HOST_DEVICE uint32_t bitsOf(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

SSD_NMS_HOST_DEVICE float floatOf(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

SSD_NMS_HOST_DEVICE float toFloat(float value)
{
    return value;
}

//! Exact, with subnormals, infinities and NaN.
SSD_NMS_HOST_DEVICE float toFloat(Half value)
{
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#else
    uint32_t const sign = static_cast<uint32_t>(value.bits & 0x8000U) << 16;
    uint32_t const magnitude = value.bits & 0x7FFFU;
    if (magnitude >= 0x7C00U) // infinity or NaN
    {
        return floatOf(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13));
    }
    // As an exponent of binary32 the half's is short by 112; the product puts it right, subnormals too.
    return floatOf(sign | (magnitude << 13)) * 0x1p112F;
#endif
}

//! e^x within 1 unit in the last place: 2^n * e^r with |r| <= ln(2)/2 (Cody and Waite 1980, chapter 6).
SSD_NMS_HOST_DEVICE float expOf(float x)
{
    x = x > 88.8F ? 88.8F : x; // infinite from here on
    x = x < -104.0F ? -104.0F : x; // 0 from here on
    float const n = rintf(x * 0x1.715476p0F); // 1 / ln(2)
    float r = fmaf(n, -0x1.62e4p-1F, x); // ln(2), its upper 15 bits: n times them is exact
    r = fmaf(n, -0x1.7f7d1cp-20F, r); // and the rest
    float power = 0x1.6a243ep-10F; // minimax polynomial of (e^r - 1 - r) / r^2
    power = fmaf(power, r, 0x1.1239e2p-7F);
    power = fmaf(power, r, 0x1.5558f2p-5F);
    power = fmaf(power, r, 0x1.555492p-3F);
    power = fmaf(power, r, 0x1.fffffcp-2F);
    power = fmaf(power * r, r, r) + 1.0F;
    // In two steps, so that neither factor leaves the range and a subnormal result is rounded once.
    // NaN reaches this line; its conversion is kept defined.
    auto const exponent = static_cast<int32_t>(x == x ? n : 0.0F);
    int32_t const half = exponent >> 1;
    float const first = floatOf(static_cast<uint32_t>(127 + half) << 23);
    float const second = floatOf(static_cast<uint32_t>(127 + exponent - half) << 23);
    return power * first * second;
}

SSD_NMS_HOST_DEVICE float sigmoidOf(float logit)
{
    return 1.0F / (1.0F + expOf(-logit));
}

//! At most ln(x), and at least ln(x) - 0.07 (but -infinity for what is not a normal number above 0).
//!
//! The mantissa stands for its logarithm: log2(1 + m) is concave and equals m at both ends of 0..1.
SSD_NMS_HOST_DEVICE float logBelow(float x)
{
    float const exponent = static_cast<float>(bitsOf(x)) * 0x1p-23F - 127.0F;
    return x >= 0x1p-126F ? exponent * 0x1.62e43p-1F - 0.001F : -INFINITY;
}

//! A logit (for softmax: its distance from the background's) that is not above this has no score above the threshold.
//!
//! For softmax, p = 1 / (1 + e^(background - logit) + ...) <= sigmoid(logit - background); for sigmoid it is equal.
//! The margin is far wider than what rounding can add to a score, and rounding of the logarithm cannot matter.
SSD_NMS_HOST_DEVICE float logitBound(float scoreThreshold)
{
    if (!(scoreThreshold > 0.0F))
    {
        return -INFINITY;
    }
    if (scoreThreshold >= 1.0F)
    {
        return INFINITY;
    }
    return logf(scoreThreshold / (1.0F - scoreThreshold)) - 0.01F;
}

//! The threshold that counts: what was asked for, but not below the lowest that is allowed. NaN stays NaN: no score is
//! above it.
SSD_NMS_HOST_DEVICE float effectiveThreshold(float asked, float lowest)
{
    return asked < lowest ? lowest : asked;
}

//! The classes of one anchor that can have a softmax score above the threshold: each takes more than the threshold of a
//! sum of 1 (with a margin for rounding).
SSD_NMS_HOST_DEVICE int32_t softmaxCandidatesPerAnchor(int32_t foregroundClasses, float scoreThreshold)
{
    double const most = 1.001 / static_cast<double>(scoreThreshold);
    return most < foregroundClasses ? static_cast<int32_t>(most) : foregroundClasses;
}

//! Maps floats to integers of the same order.
SSD_NMS_HOST_DEVICE uint32_t orderedBits(float value)
{
    uint32_t const bits = bitsOf(value);
    return bits & 0x80000000U ? ~bits : bits | 0x80000000U;
}

SSD_NMS_HOST_DEVICE float fromOrderedBits(uint32_t ordered)
{
    return floatOf(ordered & 0x80000000U ? ordered & 0x7FFFFFFFU : ~ordered);
}

//! A candidate as one number. Larger is better: score descending, then class ascending, then anchor ascending.
struct Key
{
    uint64_t value;
};

SSD_NMS_HOST_DEVICE Key makeKey(float score, int32_t label, int32_t anchor, int32_t anchors)
{
    uint32_t const index =
        static_cast<uint32_t>(label) * static_cast<uint32_t>(anchors) + static_cast<uint32_t>(anchor);
    return Key{(static_cast<uint64_t>(orderedBits(score)) << 32) | static_cast<uint32_t>(~index)};
}

SSD_NMS_HOST_DEVICE float scoreOf(Key key)
{
    return fromOrderedBits(static_cast<uint32_t>(key.value >> 32));
}

//! label * anchors + anchor
SSD_NMS_HOST_DEVICE uint32_t indexOf(Key key)
{
    return ~static_cast<uint32_t>(key.value);
}

//! What splitIndex() needs of the number of anchors.
SSD_NMS_HOST_DEVICE uint32_t inverseOf(int32_t anchors)
{
    uint64_t const inverse = (uint64_t{1} << 32) / static_cast<uint32_t>(anchors);
    return inverse > 0xFFFFFFFFU ? 0xFFFFFFFFU : static_cast<uint32_t>(inverse);
}

//! The label and the anchor of an index, without a division: the product is at most 1 too small.
SSD_NMS_HOST_DEVICE void splitIndex(uint32_t index, int32_t anchors, uint32_t inverse, int32_t& label, int32_t& anchor)
{
    auto const count = static_cast<uint32_t>(anchors);
    auto quotient = static_cast<uint32_t>((static_cast<uint64_t>(index) * inverse) >> 32);
    uint32_t rest = index - quotient * count;
    bool const isShort = rest >= count;
    quotient += isShort ? 1U : 0U;
    rest -= isShort ? count : 0U;
    label = static_cast<int32_t>(quotient);
    anchor = static_cast<int32_t>(rest);
}

SSD_NMS_HOST_DEVICE float clipped(float value)
{
    value = value > 0.0F ? value : 0.0F;
    return value < 1.0F ? value : 1.0F;
}

//! \param deltas four numbers; \param anchor cx, cy, w, h.
SSD_NMS_HOST_DEVICE Box decode(float const deltas[4], float const anchor[4], SsdNmsParams const& params)
{
    float const d0 = deltas[0] / params.boxScales[0];
    float const d1 = deltas[1] / params.boxScales[1];
    float const d2 = deltas[2] / params.boxScales[2];
    float const d3 = deltas[3] / params.boxScales[3];
    Box box;
    if (params.boxCoding == SSD_NMS_CENTER_SIZE)
    {
        float const cx = d0 * anchor[2] + anchor[0];
        float const cy = d1 * anchor[3] + anchor[1];
        float const w = expOf(d2) * anchor[2];
        float const h = expOf(d3) * anchor[3];
        box = Box{cx - 0.5F * w, cy - 0.5F * h, cx + 0.5F * w, cy + 0.5F * h};
    }
    else
    {
        box = Box{(anchor[0] - 0.5F * anchor[2]) + d0, (anchor[1] - 0.5F * anchor[3]) + d1,
            (anchor[0] + 0.5F * anchor[2]) + d2, (anchor[1] + 0.5F * anchor[3]) + d3};
    }
    if (params.clipBoxes)
    {
        box = Box{clipped(box.x1), clipped(box.y1), clipped(box.x2), clipped(box.y2)};
    }
    return box;
}

//! 0 for a box without area: flipped, flat, with a NaN, or too small for its product.
SSD_NMS_HOST_DEVICE float areaOf(Box const& box)
{
    if (!(box.x2 > box.x1 && box.y2 > box.y1))
    {
        return 0.0F;
    }
    float const area = (box.x2 - box.x1) * (box.y2 - box.y1);
    return area > 0.0F ? area : 0.0F;
}

//! Whether the IoU of two boxes is above the threshold; symmetric. All conditions are looked at together: branches
//! would cost a warp more than a division that is not needed, and no condition depends on another one's.
SSD_NMS_HOST_DEVICE bool overlaps(Box const& a, float areaA, Box const& b, float areaB, float iouThreshold)
{
    float const width = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
    float const height = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
    float const inter = width * height;
    float const both = (areaA + areaB) - inter;
    bool const hasOverlap = (width > 0.0F) & (height > 0.0F) & (inter > 0.0F);
    bool const hasArea = (areaA > 0.0F) & (areaB > 0.0F) & (both > 0.0F);
    return hasOverlap & hasArea & (inter / both > iouThreshold);
}

} // namespace ssd_nms

#endif // SSD_NMS_NUMERICS_H
