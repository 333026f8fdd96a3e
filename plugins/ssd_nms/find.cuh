//! \file find.cuh
//! The first kernel: every logit once, the candidates of each tile of anchors as 64-bit keys.

#ifndef SSD_NMS_FIND_CUH
#define SSD_NMS_FIND_CUH

#include "problem.cuh"

namespace ssd_nms
{
namespace
{

constexpr int32_t kFindThreads = 256;
//! Blocks for each multiprocessor that registers must leave room for: enough loads under way to saturate the memory.
constexpr int32_t kFindBlocks = 4;
constexpr int32_t kAnchorsPerTile = 64;
//! A tile of logits that fits here is copied to shared memory in whole vectors; larger ones are read where they are.
constexpr int32_t kTileBytes = 32 * 1024;

static_assert(kWarpSize % kLanesPerAnchor == 0, "lanes share a warp");

//! Copies contiguous numbers to shared memory in vectors of 16 bytes, wherever they begin.
//! \param target is aligned to 16 bytes and has room for 16 bytes more.
//! \return where the first number is: at the same distance from an aligned address as its source.
template <typename T>
__device__ T const* stage(T const* source, int32_t count, unsigned char* target)
{
    auto const begin = reinterpret_cast<uintptr_t>(source);
    auto const head = static_cast<int32_t>(begin % sizeof(uint4)); // these bytes belong to the tile before
    int32_t const bytes = head + count * static_cast<int32_t>(sizeof(T));
    int32_t const vectors = bytes / static_cast<int32_t>(sizeof(uint4));
    auto const* const wide = reinterpret_cast<uint4 const*>(begin - static_cast<uintptr_t>(head));
    auto* const wideTarget = reinterpret_cast<uint4*>(target);
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < vectors; i += kFindThreads)
    {
        wideTarget[i] = wide[i];
    }
    // The last vector may end after the tensor.
    T* const numbers = reinterpret_cast<T*>(target + head);
    int32_t const copied = vectors * static_cast<int32_t>(sizeof(uint4)) - head;
    int32_t const first = copied > 0 ? copied / static_cast<int32_t>(sizeof(T)) : 0;
    for (int32_t i = first + static_cast<int32_t>(threadIdx.x); i < count; i += kFindThreads)
    {
        numbers[i] = source[i];
    }
    return numbers;
}

//! One block for each tile of anchors. kLanesPerAnchor neighbours look at one anchor together.
template <typename T>
__global__ void __launch_bounds__(kFindThreads, kFindBlocks) findCandidates(Problem const problem)
{
    SSD_NMS_DYNAMIC_SHARED(memory);
    auto& count = *reinterpret_cast<int32_t*>(memory);
    SsdNmsParams const& params = problem.params;
    int32_t const classes = problem.shape.classes;
    int32_t const row = static_cast<int32_t>(blockIdx.x) / problem.tiling.tilesPerRow;
    int32_t const tile = static_cast<int32_t>(blockIdx.x) % problem.tiling.tilesPerRow;
    int32_t const firstAnchor = tile * problem.tiling.anchorsPerTile;
    int32_t const rest = problem.shape.anchors - firstAnchor;
    int32_t const anchors = rest < problem.tiling.anchorsPerTile ? rest : problem.tiling.anchorsPerTile;

    T const* tileLogits = static_cast<T const*>(problem.tensors.classLogits)
        + (static_cast<int64_t>(row) * problem.shape.anchors + firstAnchor) * classes;
    if (problem.tiling.sharedBytes != 0)
    {
        tileLogits = stage(tileLogits, anchors * classes, memory + sizeof(uint4));
    }
    if (threadIdx.x == 0)
    {
        count = 0;
    }
    __syncthreads();

    float const threshold = scoreThresholdOf(problem, row);
    float const bound = logitBound(threshold);
    bool const isSoftmax = params.scoreActivation == SSD_NMS_SOFTMAX;
    bool const isSigmoid = params.scoreActivation == SSD_NMS_SIGMOID;
    uint64_t* const keys = problem.keys + static_cast<int64_t>(blockIdx.x) * problem.tiling.keysPerTile;
    int32_t const lane = static_cast<int32_t>(threadIdx.x) % kLanesPerAnchor;
    // The lanes of one anchor always take the same way, those of a warp's different anchors do not.
    uint32_t const together = ((1U << kLanesPerAnchor) - 1U)
        << (static_cast<int32_t>(threadIdx.x) % kWarpSize / kLanesPerAnchor * kLanesPerAnchor);

    auto const emit = [&](float score, int32_t column, int32_t anchor)
    {
        int32_t const label = column - (params.backgroundClass >= 0 && column > params.backgroundClass ? 1 : 0);
        keys[atomicAdd(&count, 1)] = makeKey(score, label, anchor, problem.shape.anchors).value;
    };

    for (int32_t local = static_cast<int32_t>(threadIdx.x) / kLanesPerAnchor; local < anchors;
         local += kFindThreads / kLanesPerAnchor)
    {
        T const* const logits = tileLogits + static_cast<int64_t>(local) * classes;
        int32_t const anchor = firstAnchor + local;
        if (!isSoftmax)
        {
            for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
            {
                float const logit = toFloat(logits[c]);
                if (c != params.backgroundClass && logit > (isSigmoid ? bound : threshold))
                {
                    float const score = isSigmoid ? sigmoidOf(logit) : logit;
                    if (score > threshold)
                    {
                        emit(score, c, anchor);
                    }
                }
            }
            continue;
        }
        float best = -INFINITY; // of the foreground
        for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
        {
            best = c == params.backgroundClass ? best : fmaxf(best, toFloat(logits[c]));
        }
        for (int32_t step = kLanesPerAnchor / 2; step > 0; step /= 2)
        {
            best = fmaxf(best, __shfl_xor_sync(together, best, step));
        }
        float most = best;
        if (params.backgroundClass >= 0)
        {
            float const background = toFloat(logits[params.backgroundClass]);
            if (!(best - background > bound)) // most anchors end here, without any exp
            {
                continue;
            }
            most = fmaxf(best, background);
        }
        float sum = 0.0F;
        for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
        {
            sum += expOf(toFloat(logits[c]) - most);
        }
        for (int32_t step = kLanesPerAnchor / 2; step > 0; step /= 2)
        {
            sum += __shfl_xor_sync(together, sum, step);
        }
        float const enough = threshold * sum * 0.999F; // saves divisions, decides nothing
        for (int32_t c = lane; c < classes; c += kLanesPerAnchor)
        {
            float const power = expOf(toFloat(logits[c]) - most);
            if (c != params.backgroundClass && power > enough)
            {
                float const score = power / sum;
                if (score > threshold)
                {
                    emit(score, c, anchor);
                }
            }
        }
    }
    __syncthreads();
    if (threadIdx.x == 0)
    {
        problem.counts[blockIdx.x] = count;
    }
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_FIND_CUH
