//! \file order.cuh
//! The candidates of an image in their final order, kChunk at most at a time.
//!
//! The first chunk is found where findCandidates left the keys: a histogram over the interval of possible keys says
//! which buckets it takes. Mostly that is enough. If more is asked for, all that is left is moved once into the order
//! of its buckets; from then on a chunk is the next few keys of a run. A bucket that is larger than a chunk becomes a
//! run of its own: it is moved once more, into narrower buckets. A bucket has 11 bits of the key less than its run, so
//! no key is moved more than kRuns times, whatever the scores: the work is linear in the candidates.

#ifndef SSD_NMS_ORDER_CUH
#define SSD_NMS_ORDER_CUH

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
constexpr int32_t kBucketBits = 11;
constexpr int32_t kBuckets = 1 << kBucketBits;
constexpr int32_t kBucketsPerThread = 4;
//! Runs within runs: keys have 64 bits, and a bucket of 9 bits fits a chunk.
constexpr int32_t kRuns = (64 - 9) / kBucketBits + 1;

static_assert(kBuckets == kBucketsPerThread * kSelectThreads, "each thread has as many as one vector holds");

//! An interval of keys, cut into at most kBuckets buckets of the same width, best first.
struct Interval
{
    uint64_t low; //!< inclusive
    uint64_t top; //!< inclusive

    //! Of the position below the top, to get the bucket.
    __device__ __forceinline__ int32_t shift() const
    {
        int32_t const width = 64 - __clzll(static_cast<long long>(top - low));
        return width > kBucketBits ? width - kBucketBits : 0;
    }
};

//! Keys in the order of their buckets: part of the row's `keys` or `sorted`.
struct Run
{
    uint64_t top; //!< The key from which buckets are counted.
    uint32_t begin; //!< What was taken already is before it.
    uint32_t end;
    int32_t shift;
    int32_t isInKeys; //!< Else it is in `sorted`.
};

//! What finding the order needs of shared memory.
struct OrderShared
{
    uint64_t placed[kChunk]; //!< The keys of a chunk, bucket after bucket.
    //! The candidates in each bucket, best bucket first; then where its keys begin; then where they end. At the end are
    //! those of no bucket, for each lane of a warp another, so that all lanes add at once.
    alignas(16) uint32_t buckets[kBuckets + kWarpSize];
    uint32_t warpBegins[kWarps + 1]; //!< Candidates in the buckets before those of each warp; at the end: of all.
    Run runs[kRuns]; //!< The last one is inside a bucket of the one before, and so on.
    int32_t pivot; //!< The first bucket that does not fit into the chunk.
    uint32_t fitting; //!< Candidates in the buckets before it.
    uint32_t edge; //!< Where a run's bucket ends.
};

//! Keys whose loads and additions are under way together. No key is 0: a score is above a threshold that is not below
//! 0, so the key's highest bit is set.
constexpr int32_t kBatch = 5;
using Batch = uint64_t[kBatch];

//! The keys as findCandidates leaves them: a list for each tile. Every thread keeps its first few in registers.
class TileKeys
{
public:
    __device__ __forceinline__ TileKeys(Problem const& problem, int32_t row)
        : mTiles{problem.tiling.tilesPerRow}
        , mLanes{problem.tiling.lanesPerTile}
        , mKeysPerTile{problem.tiling.keysPerTile}
        , mLane{static_cast<int32_t>(threadIdx.x) & (mLanes - 1)}
    {
        int64_t const firstTile = static_cast<int64_t>(row) * mTiles;
        mKeys = problem.keys + firstTile * mKeysPerTile;
        mCounts = problem.counts + firstTile;
        int32_t const tile = firstOwn();
        mCount = tile < mTiles ? mCounts[tile] : 0;
        load(mHeld, mKeys + tile * mKeysPerTile, mLane, mCount);
    }

    //! Calls visit(batch) until it has seen every candidate of the row, in any order.
    template <typename Visit>
    __device__ __forceinline__ void forEach(Visit visit) const
    {
        if (mHeld[0] != 0)
        {
            visit(mHeld);
        }
        int32_t begin = mLane + kBatch * mLanes;
        int32_t count = mCount;
        int32_t tile = firstOwn();
        while (tile < mTiles)
        {
            uint64_t const* const keys = mKeys + tile * mKeysPerTile;
            for (int32_t i = begin; i < count; i += kBatch * mLanes)
            {
                uint64_t batch[kBatch];
                load(batch, keys, i, count);
                visit(batch);
            }
            tile += kSelectThreads / mLanes;
            begin = mLane;
            count = tile < mTiles ? mCounts[tile] : 0;
        }
    }

private:
    __device__ __forceinline__ int32_t firstOwn() const
    {
        return static_cast<int32_t>(threadIdx.x) / mLanes;
    }

    __device__ __forceinline__ void load(Batch& batch, uint64_t const* keys, int32_t begin, int32_t count) const
    {
#pragma unroll
        for (int32_t j = 0; j < kBatch; ++j)
        {
            int32_t const i = begin + j * mLanes;
            batch[j] = i < count ? keys[i] : 0;
        }
    }

    int32_t mTiles;
    int32_t mLanes;
    int64_t mKeysPerTile;
    int32_t mLane;
    uint64_t const* mKeys;
    int32_t const* mCounts;
    int32_t mCount;
    Batch mHeld;
};

//! Keys that lie together.
struct RunKeys
{
    uint64_t const* keys;
    uint32_t begin;
    uint32_t end;

    template <typename Visit>
    __device__ __forceinline__ void forEach(Visit visit) const
    {
        for (uint64_t i = uint64_t{begin} + threadIdx.x; i < end; i += kBatch * kSelectThreads)
        {
            Batch batch;
#pragma unroll
            for (int32_t j = 0; j < kBatch; ++j)
            {
                batch[j] = i + j * kSelectThreads < end ? keys[i + j * kSelectThreads] : 0;
            }
            visit(batch);
        }
    }
};

__device__ __forceinline__ void clearBuckets(OrderShared& shared)
{
    uint32_t const thread = threadIdx.x;
    reinterpret_cast<uint4*>(shared.buckets)[thread] = uint4{0, 0, 0, 0};
    if (thread < kWarpSize)
    {
        shared.buckets[kBuckets + thread] = 0;
    }
    if (thread <= kWarps)
    {
        shared.warpBegins[thread] = 0;
    }
}

//! The bucket of each key of a batch; a key that is further from the top than `reach` belongs to none.
__device__ __forceinline__ void bucketsOf(
    Batch const& batch, uint64_t top, uint64_t reach, int32_t shift, uint32_t (&buckets)[kBatch])
{
    uint32_t const none = kBuckets + threadIdx.x % kWarpSize;
#pragma unroll
    for (int32_t j = 0; j < kBatch; ++j)
    {
        uint64_t const distance = top - batch[j]; // of a better key, and of 0, more than that of any worse one
        buckets[j] = distance <= reach ? static_cast<uint32_t>(distance >> shift) : none;
    }
}

//! Counts the keys of an interval by bucket, turns the counts into the places where the buckets begin, and finds how
//! many of them fit a chunk. The buckets are cleared, and no thread has yet to read what this writes.
//! \return the number of candidates in the interval.
template <typename Keys>
__device__ uint32_t countBuckets(OrderShared& shared, Keys const& keys, Interval const& part, int32_t shift)
{
    __syncthreads();
    keys.forEach(
        [&](Batch const& batch)
        {
            uint32_t buckets[kBatch];
            bucketsOf(batch, part.top, part.top - part.low, shift, buckets);
#pragma unroll
            for (int32_t j = 0; j < kBatch; ++j)
            {
                atomicAdd(&shared.buckets[buckets[j]], 1U);
            }
        });
    __syncthreads();
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const lane = thread % kWarpSize;
    int32_t const warp = thread / kWarpSize;
    uint4 const counts = reinterpret_cast<uint4 const*>(shared.buckets)[thread];
    uint32_t const own = counts.x + counts.y + counts.z + counts.w;
    uint32_t upTo = own; // this thread, inclusive
#pragma unroll
    for (int32_t step = 1; step < kWarpSize; step *= 2)
    {
        uint32_t const before = __shfl_up_sync(kWholeWarp, upTo, static_cast<uint32_t>(step));
        upTo += lane >= step ? before : 0;
    }
    uint32_t const ofWarp = __shfl_sync(kWholeWarp, upTo, kWarpSize - 1);
    if (lane > warp && lane <= kWarps && ofWarp != 0)
    {
        atomicAdd(&shared.warpBegins[lane], ofWarp);
    }
    __syncthreads();
    uint4 begins;
    begins.x = shared.warpBegins[warp] + upTo - own;
    begins.y = begins.x + counts.x;
    begins.z = begins.y + counts.y;
    begins.w = begins.z + counts.z;
    reinterpret_cast<uint4*>(shared.buckets)[thread] = begins;
    uint32_t const total = shared.warpBegins[kWarps];
    uint32_t const end = begins.w + counts.w;
    if (begins.x <= kChunk && end > kChunk) // true for one thread, if not all fit
    {
        bool const isY = begins.y <= kChunk;
        bool const isZ = begins.z <= kChunk;
        bool const isW = begins.w <= kChunk;
        shared.pivot = thread * kBucketsPerThread + (isY ? 1 : 0) + (isZ ? 1 : 0) + (isW ? 1 : 0);
        shared.fitting = isW ? begins.w : isZ ? begins.z : isY ? begins.y : begins.x;
    }
    else if (thread == 0 && total <= kChunk)
    {
        shared.pivot = kBuckets;
        shared.fitting = total;
    }
    __syncthreads();
    return total;
}

//! Moves the keys of an interval's first buckets to where these begin. What `buckets` says is then where they end.
//! \param limit the first bucket that stays.
template <typename Keys>
__device__ __forceinline__ void moveKeys(
    OrderShared& shared, Keys const& keys, Interval const& part, int32_t shift, uint32_t limit, uint64_t* target)
{
    uint64_t const span = part.top - part.low;
    uint64_t const edge = (static_cast<uint64_t>(limit) << shift) - 1;
    uint64_t const reach = edge < span ? edge : span;
    keys.forEach(
        [&](Batch const& batch)
        {
            uint32_t buckets[kBatch];
            bucketsOf(batch, part.top, reach, shift, buckets);
            uint32_t places[kBatch];
#pragma unroll
            for (int32_t j = 0; j < kBatch; ++j)
            {
                places[j] = atomicAdd(&shared.buckets[buckets[j]], 1U);
            }
#pragma unroll
            for (int32_t j = 0; j < kBatch; ++j)
            {
                if (buckets[j] < kBuckets)
                {
                    target[places[j]] = batch[j];
                }
            }
        });
    __syncthreads();
}

//! Some of the best candidates, in shared.placed.
struct Chunk
{
    int32_t count; //!< 0: there are none any more.
    uint64_t top; //!< The key from which their buckets are counted.
    int32_t shift;
};

//! Finds the best candidates of an interval; the buckets are cleared.
//! \param interval its top becomes the best key that is left.
//! \param isLast whether nothing is left.
__device__ Chunk takeFirst(OrderShared& shared, TileKeys const& keys, Interval& interval, bool& isLast)
{
    Interval part = interval;
    int32_t shift = 0;
    while (true)
    {
        shift = part.shift();
        uint32_t const total = countBuckets(shared, keys, part, shift);
        if (total == 0 || shared.fitting > 0)
        {
            break;
        }
        // The best bucket alone is too large: look at it more closely. Keys differ, so this ends.
        part.top -= static_cast<uint64_t>(shared.pivot) << shift;
        uint64_t const lowest = part.top - ((uint64_t{1} << shift) - 1);
        part.low = lowest > part.low ? lowest : part.low;
        clearBuckets(shared);
    }
    auto const pivot = static_cast<uint32_t>(shared.pivot);
    auto const count = static_cast<int32_t>(shared.fitting);
    moveKeys(shared, keys, part, shift, pivot, shared.placed);
    isLast = pivot == kBuckets;
    interval.top = part.top - (static_cast<uint64_t>(pivot) << shift);
    return Chunk{count, part.top, shift};
}

//! Moves the keys of an interval to `target`, from run.begin on, bucket after bucket, and makes them a run.
template <typename Keys>
__device__ void makeRun(
    OrderShared& shared, Keys const& keys, Interval const& part, uint64_t* target, Run run, Run& made)
{
    clearBuckets(shared);
    run.top = part.top;
    run.shift = part.shift();
    run.end = run.begin + countBuckets(shared, keys, part, run.shift);
    if (threadIdx.x == 0)
    {
        made = run;
    }
    moveKeys(shared, keys, part, run.shift, kBuckets, target + run.begin);
}

//! Where in keys[begin] to keys[end - 1], part of a run, the first key is whose bucket is not in [low, high); or end.
__device__ uint32_t firstNotIn(OrderShared& shared, Run const& run, uint64_t const* keys, uint32_t begin, uint32_t end,
    uint64_t low, uint64_t high)
{
    if (threadIdx.x == 0)
    {
        shared.edge = end;
    }
    __syncthreads();
    for (uint64_t i = uint64_t{begin} + threadIdx.x; i < end; i += kSelectThreads)
    {
        uint64_t const bucket = (run.top - keys[i]) >> run.shift;
        if (bucket < low || bucket >= high)
        {
            atomicMin(&shared.edge, static_cast<uint32_t>(i));
            break;
        }
    }
    __syncthreads();
    uint32_t const edge = shared.edge;
    __syncthreads();
    return edge;
}

//! As takeFirst(), but of the runs.
//! \param depth how many runs there are.
__device__ Chunk takeNext(OrderShared& shared, uint64_t* rowKeys, uint64_t* rowSorted, int32_t& depth)
{
    while (depth > 0)
    {
        Run const run = shared.runs[depth - 1];
        uint64_t* const keys = run.isInKeys != 0 ? rowKeys : rowSorted;
        uint32_t const left = run.end - run.begin;
        if (left == 0)
        {
            --depth;
            continue;
        }
        auto const bucketAt = [&](uint32_t i)
        {
            return (run.top - keys[i]) >> run.shift;
        };
        // Whole buckets only: those before the one of the first key that is not in the chunk.
        uint64_t const first = bucketAt(run.begin);
        uint32_t end = run.end;
        if (left > kChunk)
        {
            end = firstNotIn(shared, run, keys, run.begin, run.begin + kChunk, 0, bucketAt(run.begin + kChunk));
        }
        bool const isTooLarge = end == run.begin;
        if (isTooLarge)
        {
            end = firstNotIn(shared, run, keys, run.begin + kChunk, run.end, first, first + 1);
        }
        uint64_t const last = bucketAt(end - 1);
        Interval part;
        part.top = run.top - (first << run.shift);
        part.low = run.top - (last << run.shift) - ((uint64_t{1} << run.shift) - 1);
        RunKeys const source{keys, run.begin, end};
        __syncthreads(); // all know the run
        if (threadIdx.x == 0)
        {
            shared.runs[depth - 1].begin = end;
        }
        if (isTooLarge)
        {
            Run inner{};
            inner.begin = run.begin;
            inner.isInKeys = run.isInKeys != 0 ? 0 : 1;
            makeRun(shared, source, part, run.isInKeys != 0 ? rowSorted : rowKeys, inner, shared.runs[depth]);
            ++depth;
            continue;
        }
        clearBuckets(shared);
        int32_t const shift = part.shift();
        countBuckets(shared, source, part, shift);
        moveKeys(shared, source, part, shift, kBuckets, shared.placed);
        return Chunk{static_cast<int32_t>(end - run.begin), part.top, shift};
    }
    return Chunk{};
}

//! The place in the order of a key of the chunk: within its bucket, it is the number of better ones.
__device__ __forceinline__ int32_t placeOf(OrderShared const& shared, Chunk const& chunk, uint64_t key)
{
    auto const bucket = static_cast<uint32_t>((chunk.top - key) >> chunk.shift);
    uint32_t const end = shared.buckets[bucket];
    uint32_t const begin = bucket > 0 ? shared.buckets[bucket - 1] : 0; // the end of the one before
    uint32_t place = begin;
#pragma unroll 4
    for (uint32_t i = begin; i < end; ++i)
    {
        place += shared.placed[i] > key ? 1 : 0;
    }
    return static_cast<int32_t>(place);
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_ORDER_CUH
