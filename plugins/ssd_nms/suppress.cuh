//! \file suppress.cuh
//! Greedy suppression, a group of candidates at a time, best group first.

#ifndef SSD_NMS_SUPPRESS_CUH
#define SSD_NMS_SUPPRESS_CUH

#include "order.cuh"

namespace ssd_nms
{
namespace
{

//! Candidates among which suppression is resolved at a time: the bits of one mask.
constexpr int32_t kGroup = 64;
constexpr int32_t kLanesPerCandidate = kSelectThreads / kGroup;
//! Candidates of the group that one lane compares with its own.
constexpr int32_t kPerLane = kGroup / kLanesPerCandidate;
//! Kept boxes up to this many are in shared memory; more are read from the output, so many at a time.
constexpr int32_t kKeptInShared = 512;
//! Classes that are compared at a time: of a vector.
constexpr int32_t kPerVector = 4;

static_assert(kLanesPerCandidate == 8 && kPerLane == 8, "a lane's byte of a mask of 64 bits");
static_assert(kKeptInShared == kSelectThreads, "a thread for each");

//! A mask of 64 bits for each candidate of a group, written by its lanes a byte each.
struct alignas(8) Mask
{
    uint8_t bytes[kLanesPerCandidate];
};

//! Boxes that are compared, and what they are compared by.
template <int32_t kCount>
struct BoxList
{
    Box boxes[kCount];
    float areas[kCount];
    //! Boxes of different classes do not suppress each other. -1 where there is no box; all 0 if class-agnostic.
    alignas(16) int32_t classes[kCount];
};

//! What suppression needs of shared memory.
struct SuppressShared
{
    BoxList<kChunk> chunk; //!< In the final order.
    BoxList<kKeptInShared> kept;
    int32_t labels[kChunk];
    Mask overlapping[kGroup]; //!< Which earlier candidates of the group would suppress this one.
    Mask suppressed[kGroup]; //!< Not 0: a kept one suppresses it, or there is no such candidate.
    Mask same[kGroup]; //!< With a cap: which candidates of the group are of its label, itself included.
    uint64_t keptMask; //!< Of the group.
};

__device__ __forceinline__ uint64_t bitsOf(Mask const& mask)
{
    uint64_t bits;
    memcpy(&bits, &mask, sizeof(bits));
    return bits;
}

//! Which of the 4 are of this class.
__device__ __forceinline__ uint32_t sameClass(int4 const& classes, int32_t own)
{
    return (classes.x == own ? 1U : 0U) | (classes.y == own ? 2U : 0U) | (classes.z == own ? 4U : 0U)
        | (classes.w == own ? 8U : 0U);
}

//! Compares each candidate of a group with the kept boxes in shared memory; kLanesPerCandidate lanes share that.
//! \param count of the kept boxes, those in shared memory; what is behind them has no class.
__device__ __forceinline__ bool isSuppressedByKept(SuppressShared const& shared, Box const& box, float area,
    int32_t own, int32_t lane, int32_t count, float iouThreshold)
{
    constexpr int32_t kPerStep = kLanesPerCandidate * kPerVector;
    constexpr int32_t kSteps = 8; // whose results are bits of one number
    static_assert(kSteps * kPerVector == 32, "bits of one number");
    auto const& kept = shared.kept;
    for (int32_t base = 0; base < count; base += kSteps * kPerStep)
    {
        int32_t const mine = base + lane * kPerVector;
        uint32_t same = 0;
#pragma unroll
        for (int32_t step = 0; step < kSteps; ++step)
        {
            if (base + step * kPerStep < count)
            {
                auto const& classes = *reinterpret_cast<int4 const*>(&kept.classes[mine + step * kPerStep]);
                same |= sameClass(classes, own) << (step * kPerVector);
            }
        }
        while (same != 0)
        {
            auto const bit = static_cast<uint32_t>(__ffs(static_cast<int32_t>(same)) - 1);
            same &= same - 1;
            int32_t const other = mine + (bit / kPerVector) * kPerStep + bit % kPerVector;
            if (overlaps(box, area, kept.boxes[other], kept.areas[other], iouThreshold))
            {
                return true;
            }
        }
    }
    return false;
}

//! Which of kPerLane classes or labels are this one, as bits.
__device__ __forceinline__ uint32_t sameOf(int32_t const* classes, int32_t own)
{
    auto const* const vectors = reinterpret_cast<int4 const*>(classes);
    return sameClass(vectors[0], own) | sameClass(vectors[1], own) << kPerVector;
}

//! Which of this lane's candidates of the group suppress this one, as bits.
__device__ __forceinline__ uint32_t overlappingInGroup(SuppressShared const& shared, Box const& box, float area,
    int32_t own, int32_t first, int32_t member, int32_t lane, float iouThreshold)
{
    int32_t const begin = first + lane * kPerLane;
    auto const& chunk = shared.chunk;
    uint32_t const same = sameOf(&chunk.classes[begin], own);
    int32_t const before = member - lane * kPerLane; // of this lane's candidates, those that are better
    uint32_t earlier = before <= 0 ? 0 : before >= kPerLane ? same : same & ((1U << before) - 1U);
    uint32_t overlapping = 0;
    while (earlier != 0)
    {
        uint32_t const bit = earlier & (0U - earlier);
        earlier &= earlier - 1;
        int32_t const other = begin + __ffs(static_cast<int32_t>(bit)) - 1;
        overlapping |= overlaps(box, area, chunk.boxes[other], chunk.areas[other], iouThreshold) ? bit : 0;
    }
    return overlapping;
}

//! The kept candidates of a group, exactly as greedy suppression would keep them; for a whole warp.
//!
//! Rounds instead of a walk: of those that are left, the ones that no other one that is left would suppress are kept,
//! and what they suppress goes. The best one that is not decided is decided in every round, so there are at most kGroup
//! of them; mostly there are few.
//! \param left those that may be kept.
__device__ __forceinline__ uint64_t resolveGroup(SuppressShared const& shared, uint64_t left)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    uint64_t const lower = bitsOf(shared.overlapping[lane]);
    uint64_t const upper = bitsOf(shared.overlapping[lane + kWarpSize]);
    auto const overlapped = [&](uint64_t by)
    {
        return __ballot_sync(kWholeWarp, (lower & by) != 0)
            | static_cast<uint64_t>(__ballot_sync(kWholeWarp, (upper & by) != 0)) << kWarpSize;
    };
    while (true)
    {
        uint64_t const kept = left & ~overlapped(left);
        if (kept == left)
        {
            return kept;
        }
        left &= ~overlapped(kept);
    }
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_SUPPRESS_CUH
