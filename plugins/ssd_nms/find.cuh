//! \file find.cuh
//! The first kernel: every logit once, the candidates of each tile of anchors as 64-bit keys.

#ifndef SSD_NMS_FIND_CUH
#define SSD_NMS_FIND_CUH

#include "problem.cuh"
#include "scan.cuh"

namespace ssd_nms
{
namespace
{

constexpr int32_t kFindThreads = 256;
//! Blocks for each multiprocessor that registers must leave room for: enough loads under way to saturate the memory.
constexpr int32_t kFindBlocks = 4;
constexpr int32_t kAnchorsPerTile = 64;
//! Lanes that look for an anchor's largest logit: with them a block looks at a whole tile at once.
constexpr int32_t kLanesPerScan = kFindThreads / kAnchorsPerTile;
//! A tile of logits that fits here is copied to shared memory in whole vectors; larger ones are read where they are.
constexpr int32_t kTileBytes = 32 * 1024;

static_assert(kWarpSize % kLanesPerAnchor == 0 && kWarpSize % kLanesPerScan == 0, "lanes share a warp");

//! What findCandidates has in shared memory before the tile of logits.
struct alignas(16) FindShared
{
    int32_t keys; //!< Candidates so far.
    int32_t contenders; //!< Anchors that may hold a candidate.
    float bound; //!< logitBound() of the row's threshold.
    int32_t anchors[kAnchorsPerTile]; //!< Of the contenders, within the tile, in any order.
    float most[kAnchorsPerTile]; //!< Their largest logit.
};

//! Copies contiguous numbers to shared memory in vectors of 16 bytes, wherever they begin.
//! \param target is aligned to 16 bytes and has room for 16 bytes more.
//! \return where the first number is, counted from the target: as far from an aligned address as its source.
template <typename T>
__device__ __forceinline__ int32_t stage(T const* source, int32_t count, T* target)
{
    constexpr int32_t kBatch = 4; // loads under way together
    constexpr int32_t kPerVector = static_cast<int32_t>(sizeof(uint4) / sizeof(T));
    auto const begin = reinterpret_cast<uintptr_t>(source);
    auto const head = static_cast<int32_t>(begin % sizeof(uint4) / sizeof(T)); // these belong to the tile before
    int32_t const end = head + count;
    int32_t const vectors = end / kPerVector;
    auto const* const wide = reinterpret_cast<uint4 const*>(source - head);
    auto* const wideTarget = reinterpret_cast<uint4*>(target);
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    for (int32_t i = thread; i < vectors; i += kBatch * kFindThreads)
    {
        uint4 batch[kBatch];
#pragma unroll
        for (int32_t j = 0; j < kBatch; ++j)
        {
            if (i + j * kFindThreads < vectors)
            {
                batch[j] = wide[i + j * kFindThreads];
            }
        }
#pragma unroll
        for (int32_t j = 0; j < kBatch; ++j)
        {
            if (i + j * kFindThreads < vectors)
            {
                wideTarget[i + j * kFindThreads] = batch[j];
            }
        }
    }
    // The last vector may end after the tensor.
    int32_t const copied = vectors * kPerVector;
    int32_t const rest = (copied > head ? copied : head) + thread;
    if (rest < end)
    {
        target[rest] = source[rest - head];
    }
    return head;
}

//! One block for each tile of anchors.
//! \tparam kIsStaged the tile is copied to shared memory.
template <typename T, bool kIsStaged>
__global__ void __launch_bounds__(kFindThreads, kFindBlocks) findCandidates(Problem const problem)
{
    SSD_NMS_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<FindShared*>(memory);
    using Index = typename IndexOf<kIsStaged>::Type; // a staged tile has few numbers
    SsdNmsParams const& params = problem.params;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const classes = problem.shape.classes;
    int32_t const background = params.backgroundClass;
    int32_t const row = static_cast<int32_t>(blockIdx.x) / problem.tiling.tilesPerRow;
    int32_t const tile = static_cast<int32_t>(blockIdx.x) % problem.tiling.tilesPerRow;
    int32_t const firstAnchor = tile * problem.tiling.anchorsPerTile;
    int32_t const rest = problem.shape.anchors - firstAnchor;
    int32_t const anchors = rest < problem.tiling.anchorsPerTile ? rest : problem.tiling.anchorsPerTile;

    auto const* logits = static_cast<T const*>(problem.tensors.classLogits);
    auto first = static_cast<Index>(0); // of the tile's numbers
    int64_t const firstNumber = (static_cast<int64_t>(row) * problem.shape.anchors + firstAnchor) * classes;
    if (kIsStaged)
    {
        T* const target = reinterpret_cast<T*>(memory + sizeof(FindShared));
        first = stage(logits + firstNumber, anchors * classes, target);
        logits = target;
    }
    else
    {
        first = static_cast<Index>(firstNumber);
    }
    float const threshold = scoreThresholdOf(problem, row);
    if (thread == 0)
    {
        shared.keys = 0;
        shared.contenders = 0;
        shared.bound = logitBound(threshold);
    }
    __syncthreads();

    uint64_t* const keys = problem.keys + static_cast<int64_t>(blockIdx.x) * problem.tiling.keysPerTile;
    auto const emit = [&](float score, int32_t column, int32_t anchor)
    {
        int32_t const label = column - (background >= 0 && column > background ? 1 : 0);
        keys[atomicAdd(&shared.keys, 1)] = makeKey(score, label, anchor, problem.shape.anchors).value;
    };

    if (params.scoreActivation != SSD_NMS_SOFTMAX)
    {
        bool const isSigmoid = params.scoreActivation == SSD_NMS_SIGMOID;
        float const bound = isSigmoid ? shared.bound : threshold;
        Index const numbers = static_cast<Index>(anchors) * static_cast<Index>(classes);
        for (Index i = static_cast<Index>(thread); i < numbers; i += kFindThreads)
        {
            float const logit = toFloat(logits[first + i]);
            if (logit > bound)
            {
                float const score = isSigmoid ? sigmoidOf(logit) : logit;
                auto const local = static_cast<int32_t>(i / classes);
                auto const column = static_cast<int32_t>(i % classes);
                if (column != background && score > threshold)
                {
                    emit(score, column, firstAnchor + local);
                }
            }
        }
    }
    else
    {
        // Every lane comes to every shuffle, those without an anchor, too.
        {
            int32_t const local = thread / kLanesPerScan;
            int32_t const lane = thread % kLanesPerScan;
            Index const begin = first + static_cast<Index>(local) * classes;
            float best = -INFINITY; // of the foreground
            if (local < anchors)
            {
                Index const middle = begin + (background >= 0 ? background : 0);
                if (background > 0)
                {
                    best = largest<kLanesPerScan>(logits, begin, middle, lane, best);
                }
                if (background < classes - 1)
                {
                    Index const after = middle + (background >= 0 ? 1 : 0);
                    best = largest<kLanesPerScan>(logits, after, begin + classes, lane, best);
                }
            }
#pragma unroll
            for (int32_t step = kLanesPerScan / 2; step > 0; step /= 2)
            {
                best = fmaxf(best, __shfl_xor_sync(kWholeWarp, best, step));
            }
            if (lane == 0 && local < anchors)
            {
                float most = best;
                bool isContender = true;
                if (background >= 0)
                {
                    float const other = toFloat(logits[begin + background]);
                    isContender = best - other > shared.bound; // most anchors end here, without any exp
                    most = fmaxf(best, other);
                }
                if (isContender)
                {
                    int32_t const place = atomicAdd(&shared.contenders, 1);
                    shared.anchors[place] = local;
                    shared.most[place] = most;
                }
            }
        }
        __syncthreads();
        int32_t const contenders = shared.contenders;
        int32_t const lane = thread % kLanesPerAnchor;
        constexpr int32_t kPerWarp = kWarpSize / kLanesPerAnchor;
        for (int32_t group = thread / kWarpSize * kPerWarp; group < contenders; group += kFindThreads / kLanesPerAnchor)
        {
            int32_t const own = group + thread % kWarpSize / kLanesPerAnchor;
            bool const isReal = own < contenders;
            int32_t const contender = isReal ? own : group;
            int32_t const local = shared.anchors[contender];
            float const most = shared.most[contender];
            Index const begin = first + static_cast<Index>(local) * classes;
            float sum = 0.0F;
#pragma unroll 4
            for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
            {
                sum += expOf(toFloat(logits[begin + c]) - most);
            }
#pragma unroll
            for (int32_t step = kLanesPerAnchor / 2; step > 0; step /= 2)
            {
                sum += __shfl_xor_sync(kWholeWarp, sum, step);
            }
            float const least = logBelow(threshold * sum) - 0.01F; // saves exps and divisions, decides nothing
            for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
            {
                float const distance = toFloat(logits[begin + c]) - most;
                if (distance > least && c != background && isReal)
                {
                    float const score = expOf(distance) / sum;
                    if (score > threshold)
                    {
                        emit(score, c, firstAnchor + local);
                    }
                }
            }
        }
    }
    __syncthreads();
    if (thread == 0)
    {
        problem.counts[blockIdx.x] = shared.keys;
    }
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_FIND_CUH
