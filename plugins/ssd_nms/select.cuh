//! \file select.cuh
//! The second kernel: the best candidates of an image in their final order, suppression, and the answer.

#ifndef SSD_NMS_SELECT_CUH
#define SSD_NMS_SELECT_CUH

#include "order.cuh"
#include "suppress.cuh"

namespace ssd_nms
{
namespace
{

//! The shared memory of selectDetections.
struct SelectShared
{
    OrderShared order;
    SuppressShared suppress;
    float scores[kChunk]; //!< Of suppress.chunk.
};

static_assert(sizeof(SelectShared) <= 48 * 1024, "more needs an attribute of the kernel");

template <typename T>
__device__ __forceinline__ void loadFour(T const* source, float values[4])
{
    struct alignas(4 * sizeof(T)) Four
    {
        T values[4];
    };
    Four const four = *reinterpret_cast<Four const*>(source);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i)
    {
        values[i] = toFloat(four.values[i]);
    }
}

//! Puts a chunk in its final order and decodes its boxes; each thread takes the candidate at its place in `placed`.
template <typename T>
__device__ __forceinline__ void decodeChunk(
    Problem const& problem, int32_t row, SelectShared& shared, Chunk const& chunk)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    auto& suppress = shared.suppress;
    if (thread >= chunk.count)
    {
        suppress.chunk.classes[thread] = -1;
        suppress.labels[thread] = -1;
        return;
    }
    uint64_t const key = shared.order.placed[thread];
    int32_t label;
    int32_t anchor;
    splitIndex(indexOf(Key{key}), problem.shape.anchors, problem.inverseAnchors, label, anchor);
    int64_t const index = static_cast<int64_t>(row) * problem.shape.anchors + anchor;
    float deltas[4];
    float prior[4];
    loadFour(static_cast<T const*>(problem.tensors.boxDeltas) + index * 4, deltas);
    loadFour(problem.tensors.anchors + static_cast<int64_t>(anchor) * 4, prior);
    int32_t const place = placeOf(shared.order, chunk, key); // while the loads are under way
    suppress.labels[place] = label;
    suppress.chunk.classes[place] = problem.params.classAgnostic != 0 ? 0 : label;
    shared.scores[place] = scoreOf(Key{key});
    Box const box = decode(deltas, prior, problem.params);
    suppress.chunk.boxes[place] = box;
    suppress.chunk.areas[place] = areaOf(box);
}

//! Where a row's answer goes.
struct Answer
{
    Box* boxes;
    float* scores;
    int32_t* labels;
};

//! Fills suppress.kept with the kept boxes from `base` on, which the answer has already.
__device__ void reloadKept(SuppressShared& shared, Answer const& answer, int32_t base, int32_t kept, bool isAgnostic)
{
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    __syncthreads();
    if (base + thread < kept)
    {
        Box const box = answer.boxes[base + thread];
        shared.kept.boxes[thread] = box;
        shared.kept.areas[thread] = areaOf(box);
        shared.kept.classes[thread] = isAgnostic ? 0 : answer.labels[base + thread];
    }
    else
    {
        shared.kept.classes[thread] = -1;
    }
    __syncthreads();
}

//! Suppresses and caps a group of candidates, from `first` on in the chunk, and writes what is kept.
//! \param seen [foregroundClasses], with a cap: candidates of each label in the groups before this one.
//! \param kept detections so far.
//! \return detections with those of this group.
__device__ __forceinline__ int32_t suppressGroup(SelectShared& shared, SsdNmsParams const& params, float iouThreshold,
    int32_t first, int32_t* seen, int32_t kept, Answer const& answer)
{
    SuppressShared& suppress = shared.suppress;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    bool const isAgnostic = params.classAgnostic != 0;
    int32_t const cap = params.topkPerClass;
    {
        int32_t const member = thread / kLanesPerCandidate;
        int32_t const lane = thread % kLanesPerCandidate;
        int32_t const own = suppress.chunk.classes[first + member];
        Box const box = suppress.chunk.boxes[first + member];
        float const area = suppress.chunk.areas[first + member];
        bool isOut = own < 0;
        if (kept <= kKeptInShared)
        {
            isOut = isOut || isSuppressedByKept(suppress, box, area, own, lane, kept, iouThreshold);
        }
        for (int32_t base = 0; kept > kKeptInShared && base < kept; base += kKeptInShared)
        {
            reloadKept(suppress, answer, base, kept, isAgnostic);
            int32_t const rest = kept - base < kKeptInShared ? kept - base : kKeptInShared;
            isOut = isOut || isSuppressedByKept(suppress, box, area, own, lane, rest, iouThreshold);
        }
        suppress.suppressed[member].bytes[lane] = isOut ? 1 : 0;
        uint32_t const overlapping =
            isOut ? 0 : overlappingInGroup(suppress, box, area, own, first, member, lane, iouThreshold);
        suppress.overlapping[member].bytes[lane] = static_cast<uint8_t>(overlapping);
        if (cap > 0)
        {
            uint32_t const same = sameOf(&suppress.labels[first + lane * kPerLane], suppress.labels[first + member]);
            suppress.same[member].bytes[lane] = static_cast<uint8_t>(same);
        }
    }
    __syncthreads();
    int32_t next = 0; // what the cap has seen of this thread's label after the group
    if (thread < kGroup)
    {
        // Two warps come to the same mask; each thread then writes its own candidate.
        int32_t const lane = thread % kWarpSize;
        bool isAlive[2];
#pragma unroll
        for (int32_t half = 0; half < 2; ++half)
        {
            int32_t const member = lane + half * kWarpSize;
            isAlive[half] = bitsOf(suppress.suppressed[member]) == 0;
            int32_t const label = suppress.labels[first + member];
            if (cap > 0 && label >= 0)
            {
                uint64_t const same = bitsOf(suppress.same[member]);
                int32_t const rank = seen[label] + __popcll(same & ((uint64_t{1} << member) - 1));
                isAlive[half] = isAlive[half] && rank < cap;
                bool const isLast = same >> member == 1;
                next = isLast && member == thread ? rank + 1 : next;
            }
        }
        uint64_t const undecided = __ballot_sync(kWholeWarp, isAlive[0])
            | static_cast<uint64_t>(__ballot_sync(kWholeWarp, isAlive[1])) << kWarpSize;
        uint64_t const mask = resolveGroup(suppress, undecided);
        if (thread == 0)
        {
            suppress.keptMask = mask;
        }
        int32_t const place = kept + __popcll(mask & ((uint64_t{1} << thread) - 1));
        if (((mask >> thread) & 1) != 0 && place < params.maxDetections)
        {
            int32_t const source = first + thread;
            Box const box = suppress.chunk.boxes[source];
            answer.boxes[place] = box;
            answer.scores[place] = shared.scores[source];
            answer.labels[place] = suppress.labels[source];
            if (place < kKeptInShared)
            {
                suppress.kept.boxes[place] = box;
                suppress.kept.areas[place] = suppress.chunk.areas[source];
                suppress.kept.classes[place] = suppress.chunk.classes[source];
            }
        }
    }
    __syncthreads();
    if (next != 0)
    {
        seen[suppress.labels[first + thread]] = next; // read again after the next barrier only
    }
    return kept + __popcll(suppress.keptMask);
}

//! One block for each row.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) selectDetections(Problem const problem)
{
    SSD_NMS_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<SelectShared*>(memory);
    SsdNmsParams const& params = problem.params;
    int32_t const thread = static_cast<int32_t>(threadIdx.x);
    int32_t const row = static_cast<int32_t>(blockIdx.x);
    int32_t const most = params.maxDetections;
    int64_t const firstKey = static_cast<int64_t>(row) * problem.tiling.tilesPerRow * problem.tiling.keysPerTile;
    int64_t const firstOut = static_cast<int64_t>(row) * most;
    Answer const answer{reinterpret_cast<Box*>(problem.tensors.boxes) + firstOut, problem.tensors.scores + firstOut,
        problem.tensors.labels + firstOut};
    int32_t* const seen = problem.seen + static_cast<int64_t>(row) * problem.foregroundClasses;

    clearBuckets(shared.order);
    shared.suppress.kept.classes[thread] = -1;
    for (int32_t i = thread; params.topkPerClass > 0 && i < problem.foregroundClasses; i += kSelectThreads)
    {
        seen[i] = 0; // first read after a barrier
    }
    float const iouThreshold =
        problem.shape.hasIouThresholds ? problem.tensors.iouThresholds[row] : params.iouThreshold;
    // Scores are above the threshold and, but for activation `none`, at most 1.
    float const highest = params.scoreActivation == SSD_NMS_NONE ? INFINITY : 1.0F;
    Interval interval{static_cast<uint64_t>(orderedBits(scoreThresholdOf(problem, row))) << 32,
        (static_cast<uint64_t>(orderedBits(highest)) << 32) | 0xFFFFFFFFU};
    interval.low = interval.low < interval.top ? interval.low : interval.top;

    bool isLast = false;
    Chunk chunk = takeFirst(shared.order, TileKeys{problem, row}, interval, isLast);
    int32_t kept = 0;
    int32_t runs = -1; // all that is left is still in the tiles
    while (chunk.count > 0)
    {
        decodeChunk<T>(problem, row, shared, chunk);
        __syncthreads();
        for (int32_t first = 0; first < chunk.count && kept < most; first += kGroup)
        {
            kept = suppressGroup(shared, params, iouThreshold, first, seen, kept, answer);
        }
        if (isLast || kept >= most)
        {
            break;
        }
        uint64_t* const sorted = problem.sorted + firstKey;
        if (runs < 0)
        {
            makeRun(shared.order, TileKeys{problem, row}, interval, sorted, Run{}, shared.order.runs[0]);
            runs = 1;
        }
        chunk = takeNext(shared.order, problem.keys + firstKey, sorted, runs);
    }
    kept = kept < most ? kept : most;
    if (thread == 0)
    {
        problem.tensors.numDetections[row] = kept;
    }
    for (int64_t i = static_cast<int64_t>(kept) + thread; i < most; i += kSelectThreads)
    {
        answer.boxes[i] = Box{0.0F, 0.0F, 0.0F, 0.0F};
        answer.scores[i] = 0.0F;
        answer.labels[i] = -1;
    }
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_SELECT_CUH
