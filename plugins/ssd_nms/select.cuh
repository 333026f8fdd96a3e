//! \file select.cuh
//! The second kernel: the best candidates of an image in their final order, suppression, and the answer.

#ifndef SSD_NMS_SELECT_CUH
#define SSD_NMS_SELECT_CUH

#include "problem.cuh"

namespace ssd_nms
{
namespace
{

constexpr int32_t kSelectThreads = 512;
constexpr int32_t kWarps = kSelectThreads / kWarpSize;
//! Candidates that are put in order at a time: one for each thread.
constexpr int32_t kChunk = kSelectThreads;
//! Buckets of the histogram by which the best of all candidates are found.
constexpr int32_t kBuckets = 2048;
constexpr int32_t kBucketsPerThread = kBuckets / kSelectThreads;
//! Candidates among which suppression is resolved at a time: the bits of one mask.
constexpr int32_t kGroup = 64;
constexpr int32_t kLanesPerCandidate = kSelectThreads / kGroup;
//! Kept boxes up to this many are in shared memory, beyond it they are read from the output.
constexpr int32_t kKeptInShared = 512;

static_assert(kWarpSize % kLanesPerCandidate == 0, "lanes share a warp");
static_assert(kBuckets % kSelectThreads == 0 && (kBuckets & (kBuckets - 1)) == 0, "a power of two, shared evenly");

//! The shared memory of selectDetections.
struct SelectShared
{
    uint64_t placed[kChunk]; //!< The keys of a chunk, bucket after bucket.
    uint64_t ordered[kChunk]; //!< The same keys, best first.
    uint64_t overlapping[kGroup]; //!< Which earlier candidates of the group would suppress this one.
    uint64_t keptMask;
    Box boxes[kChunk]; //!< Of `ordered`, as are the next two.
    float areas[kChunk];
    int32_t labels[kChunk];
    Box keptBoxes[kKeptInShared];
    float keptAreas[kKeptInShared];
    int32_t keptLabels[kKeptInShared];
    //! The candidates in each bucket, best bucket first; then where its keys begin in `placed`; then where they end.
    int32_t buckets[kBuckets];
    int32_t warpTotals[kWarps];
    int32_t alive[kGroup];
    int32_t total; //!< Candidates in the interval.
    int32_t pivot; //!< The first bucket that does not fit into the chunk.
    int32_t fitting; //!< Candidates in the buckets before it.
};

static_assert(sizeof(SelectShared) <= 48 * 1024, "more needs an attribute of the kernel");

//! Calls visit(key) for every candidate of a row, in any order.
template <typename Visit>
__device__ __forceinline__ void forEachKey(Problem const& problem, int32_t row, Visit visit)
{
    constexpr int32_t kLanes = 4; // most tiles hold few candidates, and their loads should be under way together
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kLanes;
    int64_t const firstTile = static_cast<int64_t>(row) * problem.tiling.tilesPerRow;
    for (int32_t tile = static_cast<int32_t>(threadIdx.x) / kLanes; tile < problem.tiling.tilesPerRow;
         tile += kSelectThreads / kLanes)
    {
        uint64_t const* const keys = problem.keys + (firstTile + tile) * problem.tiling.keysPerTile;
        int32_t const count = problem.counts[firstTile + tile];
#pragma unroll 4
        for (int32_t i = lane; i < count; i += kLanes)
        {
            visit(keys[i]);
        }
    }
}

//! An interval of keys, cut into at most kBuckets buckets of the same width, best first.
struct Interval
{
    uint64_t low; //!< inclusive
    uint64_t top; //!< inclusive

    __device__ __forceinline__ int32_t shift() const
    {
        constexpr int32_t kBucketBits = 11;
        static_assert(kBuckets == 1 << kBucketBits, "buckets and their bits");
        int32_t const width = 64 - __clzll(static_cast<long long>(top - low));
        return width > kBucketBits ? width - kBucketBits : 0;
    }
};

//! Turns the counts of shared.buckets into the places where they begin, and finds how many of them fit a chunk.
__device__ void findPivot(SelectShared& shared)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;
    int32_t const first = thread * kBucketsPerThread;
    int32_t counts[kBucketsPerThread];
    int32_t own = 0;
#pragma unroll
    for (int32_t i = 0; i < kBucketsPerThread; ++i)
    {
        counts[i] = shared.buckets[first + i];
        own += counts[i];
    }
    int32_t upTo = own; // this thread, inclusive
    for (int32_t step = 1; step < kWarpSize; step *= 2)
    {
        int32_t const before = __shfl_up_sync(kWholeWarp, upTo, static_cast<uint32_t>(step));
        upTo += lane >= step ? before : 0;
    }
    if (lane == kWarpSize - 1)
    {
        shared.warpTotals[warp] = upTo;
    }
    __syncthreads();
    int32_t begin = upTo - own;
    for (int32_t i = 0; i < warp; ++i)
    {
        begin += shared.warpTotals[i];
    }
#pragma unroll
    for (int32_t i = 0; i < kBucketsPerThread; ++i)
    {
        int32_t const end = begin + counts[i];
        shared.buckets[first + i] = begin;
        if (begin <= kChunk && end > kChunk) // true for one bucket at most
        {
            shared.pivot = first + i;
            shared.fitting = begin;
        }
        begin = end;
    }
    if (thread == kSelectThreads - 1)
    {
        shared.total = begin;
        if (begin <= kChunk)
        {
            shared.pivot = kBuckets;
            shared.fitting = begin;
        }
    }
    __syncthreads();
}

//! Finds the best candidates with keys up to interval.top, kChunk at most, and leaves them in shared.ordered.
//! \param interval its top becomes the best key that is left.
//! \param isLast whether nothing is left.
//! \return their number; 0 only if there are none.
__device__ int32_t takeChunk(
    Problem const& problem, int32_t row, SelectShared& shared, Interval& interval, bool& isLast)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    Interval part = interval;
    int32_t shift = 0;
    while (true)
    {
        for (int32_t i = thread; i < kBuckets; i += kSelectThreads)
        {
            shared.buckets[i] = 0;
        }
        __syncthreads();
        shift = part.shift();
        forEachKey(problem, row,
            [&](uint64_t key)
            {
                if (key >= part.low && key <= part.top)
                {
                    atomicAdd(&shared.buckets[(part.top - key) >> shift], 1);
                }
            });
        __syncthreads();
        findPivot(shared);
        if (shared.total == 0 || shared.fitting > 0)
        {
            break;
        }
        // The best bucket alone is too large: look at it more closely. Keys differ, so this ends.
        part.top -= static_cast<uint64_t>(shared.pivot) << shift;
        uint64_t const lowest = part.top - ((uint64_t{1} << shift) - 1);
        part.low = lowest > part.low ? lowest : part.low;
    }
    int32_t const count = shared.fitting;
    int32_t const pivot = shared.pivot;
    if (count > 0)
    {
        forEachKey(problem, row,
            [&](uint64_t key)
            {
                uint64_t const bucket = (part.top - key) >> shift;
                if (key >= part.low && key <= part.top && bucket < static_cast<uint64_t>(pivot))
                {
                    shared.placed[atomicAdd(&shared.buckets[bucket], 1)] = key;
                }
            });
        __syncthreads();
        if (thread < count)
        {
            // Within its bucket a key's place is the number of better ones.
            uint64_t const key = shared.placed[thread];
            uint64_t const bucket = (part.top - key) >> shift;
            int32_t const end = shared.buckets[bucket];
            int32_t const begin = bucket > 0 ? shared.buckets[bucket - 1] : 0; // the end of the one before
            int32_t place = begin;
            for (int32_t i = begin; i < end; ++i)
            {
                place += shared.placed[i] > key ? 1 : 0;
            }
            shared.ordered[place] = key;
        }
        __syncthreads();
    }
    isLast = pivot == kBuckets;
    interval.top = isLast ? interval.low : part.top - (static_cast<uint64_t>(pivot) << shift);
    return count;
}

template <typename T>
__device__ __forceinline__ void loadDeltas(T const* source, float deltas[4])
{
    struct alignas(4 * sizeof(T)) Four
    {
        T values[4];
    };
    Four const four = *reinterpret_cast<Four const*>(source);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i)
    {
        deltas[i] = toFloat(four.values[i]);
    }
}

//! The kept candidates of a group, exactly as greedy suppression would keep them; for one warp.
//!
//! Rounds instead of a walk: a candidate is kept once all that would suppress it are gone, and gone once one of them is
//! kept. The best undecided one is decided in every round, so there are at most kGroup of them; mostly there are few.
__device__ uint64_t resolveGroup(SelectShared const& shared)
{
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kWarpSize;
    uint64_t const lower = shared.overlapping[lane];
    uint64_t const upper = shared.overlapping[lane + kWarpSize];
    uint64_t undecided = __ballot_sync(kWholeWarp, shared.alive[lane])
        | static_cast<uint64_t>(__ballot_sync(kWholeWarp, shared.alive[lane + kWarpSize])) << kWarpSize;
    uint64_t kept = 0;
    while (undecided != 0)
    {
        uint64_t const keep = __ballot_sync(kWholeWarp, (lower & (undecided | kept)) == 0)
            | static_cast<uint64_t>(__ballot_sync(kWholeWarp, (upper & (undecided | kept)) == 0)) << kWarpSize;
        kept |= keep & undecided;
        uint64_t const drop = __ballot_sync(kWholeWarp, (lower & kept) != 0)
            | static_cast<uint64_t>(__ballot_sync(kWholeWarp, (upper & kept) != 0)) << kWarpSize;
        undecided &= ~(kept | drop);
    }
    return kept;
}

//! One block for each row.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads) selectDetections(Problem const problem)
{
    SSD_NMS_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<SelectShared*>(memory);
    SsdNmsParams const& params = problem.params;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const row = static_cast<int32_t>(blockIdx.x);
    int32_t const anchors = problem.shape.anchors;
    int32_t const most = params.maxDetections;
    int32_t const cap = params.topkPerClass;
    float const iouThreshold =
        problem.shape.hasIouThresholds ? problem.tensors.iouThresholds[row] : params.iouThreshold;

    Box* const outBoxes = reinterpret_cast<Box*>(problem.tensors.boxes) + static_cast<int64_t>(row) * most;
    float* const outScores = problem.tensors.scores + static_cast<int64_t>(row) * most;
    int32_t* const outLabels = problem.tensors.labels + static_cast<int64_t>(row) * most;
    bool const isInShared = most <= kKeptInShared;
    Box const* const keptBoxes = isInShared ? shared.keptBoxes : outBoxes;
    int32_t const* const keptLabels = isInShared ? shared.keptLabels : outLabels;

    int32_t* const seen = problem.seen + static_cast<int64_t>(row) * problem.foregroundClasses;
    for (int32_t i = thread; cap > 0 && i < problem.foregroundClasses; i += kSelectThreads)
    {
        seen[i] = 0; // first read after a barrier
    }

    // Scores are above the threshold and, but for activation `none`, at most 1.
    float const highest = params.scoreActivation == SSD_NMS_NONE ? INFINITY : 1.0F;
    Interval interval{static_cast<uint64_t>(orderedBits(scoreThresholdOf(problem, row))) << 32,
        (static_cast<uint64_t>(orderedBits(highest)) << 32) | 0xFFFFFFFFU};
    interval.low = interval.low < interval.top ? interval.low : interval.top;

    int32_t kept = 0;
    bool isLast = false;
    while (!isLast && kept < most)
    {
        int32_t const chunk = takeChunk(problem, row, shared, interval, isLast);
        if (thread < chunk)
        {
            uint32_t const index = indexOf(Key{shared.ordered[thread]});
            auto const label = static_cast<int32_t>(index / static_cast<uint32_t>(anchors));
            auto const anchor = static_cast<int32_t>(index % static_cast<uint32_t>(anchors));
            float deltas[4];
            float prior[4];
            loadDeltas(
                static_cast<T const*>(problem.tensors.boxDeltas) + (static_cast<int64_t>(row) * anchors + anchor) * 4,
                deltas);
            loadDeltas(problem.tensors.anchors + static_cast<int64_t>(anchor) * 4, prior);
            Box const box = decode(deltas, prior, params);
            shared.boxes[thread] = box;
            shared.areas[thread] = areaOf(box);
            shared.labels[thread] = label;
        }
        __syncthreads();

        for (int32_t first = 0; first < chunk && kept < most; first += kGroup)
        {
            int32_t const group = chunk - first < kGroup ? chunk - first : kGroup;
            int32_t const member = thread / kLanesPerCandidate;
            int32_t const lane = thread % kLanesPerCandidate;
            int32_t const candidate = first + member;
            bool isSuppressed = member >= group;
            uint64_t overlapping = 0;
            int32_t before = 0; // candidates of this class before this one, in the group
            int32_t after = 0;
            int32_t label = 0;
            if (member < group)
            {
                Box const box = shared.boxes[candidate];
                float const area = shared.areas[candidate];
                label = shared.labels[candidate];
                for (int32_t i = lane; i < kept && !isSuppressed; i += kLanesPerCandidate)
                {
                    if (params.classAgnostic || keptLabels[i] == label)
                    {
                        Box const other = keptBoxes[i];
                        float const otherArea = isInShared ? shared.keptAreas[i] : areaOf(other);
                        isSuppressed = overlaps(box, area, other, otherArea, iouThreshold);
                    }
                }
                for (int32_t i = lane; i < group; i += kLanesPerCandidate)
                {
                    bool const isSameClass = shared.labels[first + i] == label;
                    before += isSameClass && i < member ? 1 : 0;
                    after += isSameClass && i > member ? 1 : 0;
                    if (i < member && (params.classAgnostic || isSameClass)
                        && overlaps(box, area, shared.boxes[first + i], shared.areas[first + i], iouThreshold))
                    {
                        overlapping |= uint64_t{1} << i;
                    }
                }
            }
            for (int32_t step = kLanesPerCandidate / 2; step > 0; step /= 2)
            {
                isSuppressed |= __shfl_xor_sync(kWholeWarp, isSuppressed ? 1 : 0, step) != 0;
                overlapping |= __shfl_xor_sync(kWholeWarp, static_cast<unsigned long long>(overlapping), step);
                before += __shfl_xor_sync(kWholeWarp, before, step);
                after += __shfl_xor_sync(kWholeWarp, after, step);
            }
            int32_t const rank = before + (cap > 0 && member < group ? seen[label] : 0);
            if (lane == 0)
            {
                shared.overlapping[member] = overlapping;
                shared.alive[member] = !isSuppressed && (cap == 0 || rank < cap) ? 1 : 0;
            }
            __syncthreads();
            if (cap > 0 && lane == 0 && member < group && after == 0)
            {
                seen[label] = rank + 1;
            }
            if (thread < kWarpSize)
            {
                uint64_t const mask = resolveGroup(shared);
                if (thread == 0)
                {
                    shared.keptMask = mask;
                }
            }
            __syncthreads();
            uint64_t const mask = shared.keptMask;
            if (thread < group && ((mask >> thread) & 1) != 0)
            {
                int32_t const place = kept + __popcll(mask & ((uint64_t{1} << thread) - 1));
                if (place < most)
                {
                    int32_t const source = first + thread;
                    outBoxes[place] = shared.boxes[source];
                    outScores[place] = scoreOf(Key{shared.ordered[source]});
                    outLabels[place] = shared.labels[source];
                    if (isInShared)
                    {
                        shared.keptBoxes[place] = shared.boxes[source];
                        shared.keptAreas[place] = shared.areas[source];
                        shared.keptLabels[place] = shared.labels[source];
                    }
                }
            }
            kept += __popcll(mask);
            __syncthreads();
        }
    }
    kept = kept < most ? kept : most;
    if (thread == 0)
    {
        problem.tensors.numDetections[row] = kept;
    }
    for (int64_t i = static_cast<int64_t>(kept) + thread; i < most; i += kSelectThreads)
    {
        outBoxes[i] = Box{0.0F, 0.0F, 0.0F, 0.0F};
        outScores[i] = 0.0F;
        outLabels[i] = -1;
    }
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_SELECT_CUH
