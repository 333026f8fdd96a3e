//! \file kernels.cu
//! SSDNMS on the GPU, in two launches.
//!
//! `findCandidates` reads every logit once and writes the candidates of each tile of anchors as 64-bit keys.
//! `selectDetections`, one block per image, takes the best few hundred candidates at a time, in their final order, and
//! suppresses until K are kept or none is left. A candidate can only be suppressed by a better one of its class, so one
//! pass in score order gives the same detections as suppression class by class and a merge. Nothing is sorted as a
//! whole, and no more boxes are decoded than the answer needs.
//!
//! Nothing depends on the order in which threads arrive: atomics hand out places only, and keys, which are all
//! different, then put everything in order.

#include "find.cuh"
#include "launch_error.cuh"
#include "select.cuh"

namespace ssd_nms
{
namespace
{

//! The parts of the workspace: offsets in bytes.
struct Layout
{
    size_t sorted;
    size_t counts;
    size_t seen;
    size_t size;
};

size_t bytesOf(int32_t type)
{
    return type == SSD_NMS_FLOAT16 ? sizeof(Half) : sizeof(float);
}

Tiling tilingOf(SsdNmsParams const& params, SsdNmsShape const& shape)
{
    Tiling tiling{};
    size_t const anchorBytes = static_cast<size_t>(shape.classes) * bytesOf(shape.logitsType);
    size_t const fitting = kTileBytes / anchorBytes;
    tiling.anchorsPerTile = fitting == 0 || fitting > kAnchorsPerTile ? kAnchorsPerTile : static_cast<int32_t>(fitting);
    tiling.sharedBytes = fitting == 0 ? 0 : static_cast<int32_t>(anchorBytes) * tiling.anchorsPerTile;
    tiling.tilesPerRow = (shape.anchors - 1) / tiling.anchorsPerTile + 1;
    int32_t const foreground = foregroundClasses(params, shape);
    bool const isSoftmax = params.scoreActivation == SSD_NMS_SOFTMAX;
    // A threshold that comes with a request is not known here, but it is not below the lowest.
    float const threshold =
        effectiveThreshold(shape.hasScoreThresholds ? 0.0F : params.scoreThreshold, params.lowestScoreThreshold);
    tiling.keysPerTile = static_cast<int64_t>(tiling.anchorsPerTile)
        * (isSoftmax ? softmaxCandidatesPerAnchor(foreground, threshold) : foreground);
    tiling.lanesPerTile = 1;
    while (tiling.lanesPerTile < kWarpSize && tiling.lanesPerTile * 2 * tiling.tilesPerRow <= kSelectThreads)
    {
        tiling.lanesPerTile *= 2;
    }
    return tiling;
}

//! Keys first (offset 0), then room for as many, then counts, then what the cap needs.
Layout layoutOf(SsdNmsParams const& params, SsdNmsShape const& shape)
{
    auto const aligned = [](size_t bytes)
    {
        return (bytes + 15) / 16 * 16;
    };
    Tiling const tiling = tilingOf(params, shape);
    size_t const tiles = static_cast<size_t>(shape.batch) * static_cast<size_t>(tiling.tilesPerRow);
    size_t const labels = static_cast<size_t>(shape.batch) * static_cast<size_t>(foregroundClasses(params, shape));
    Layout layout{};
    layout.sorted = aligned(tiles * static_cast<size_t>(tiling.keysPerTile) * sizeof(uint64_t));
    layout.counts = 2 * layout.sorted;
    layout.seen = layout.counts + aligned(tiles * sizeof(int32_t));
    layout.size = layout.seen + (params.topkPerClass > 0 ? aligned(labels * sizeof(int32_t)) : 0);
    return layout;
}

using Kernel = void (*)(Problem);

Kernel findKernelOf(SsdNmsShape const& shape, Tiling const& tiling)
{
    bool const isStaged = tiling.sharedBytes != 0;
    if (shape.logitsType == SSD_NMS_FLOAT16)
    {
        return isStaged ? findCandidates<Half, true> : findCandidates<Half, false>;
    }
    return isStaged ? findCandidates<float, true> : findCandidates<float, false>;
}

cudaError_t launch(
    Kernel kernel, int32_t blocks, int32_t threads, size_t sharedBytes, Problem const& problem, cudaStream_t stream)
{
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<uint32_t>(blocks));
    config.blockDim = dim3(static_cast<uint32_t>(threads));
    config.dynamicSmemBytes = sharedBytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, problem);
}

} // namespace
} // namespace ssd_nms

size_t ssdNmsWorkspaceSize(SsdNmsParams const* params, SsdNmsShape const* shape)
{
    bool const isValid = shape != nullptr && ssdNmsValidate(params, shape, nullptr, 0) == SSD_NMS_OK;
    return isValid ? ssd_nms::layoutOf(*params, *shape).size : 0;
}

SsdNmsStatus ssdNmsLaunch(SsdNmsParams const* params, SsdNmsShape const* shape, SsdNmsTensors const* tensors,
    void* workspace, size_t workspaceSize, void* stream)
{
    using namespace ssd_nms;
    SsdNmsStatus const status = checkCall(params, shape, tensors);
    if (status != SSD_NMS_OK)
    {
        return status;
    }
    if (workspace == nullptr || reinterpret_cast<uintptr_t>(workspace) % 16 != 0)
    {
        return SSD_NMS_INVALID_POINTER;
    }
    Layout const layout = layoutOf(*params, *shape);
    if (workspaceSize < layout.size)
    {
        return SSD_NMS_WORKSPACE_TOO_SMALL;
    }

    auto* const bytes = static_cast<unsigned char*>(workspace);
    Problem problem{};
    problem.params = *params;
    problem.shape = *shape;
    problem.tensors = *tensors;
    problem.tiling = tilingOf(*params, *shape);
    problem.foregroundClasses = foregroundClasses(*params, *shape);
    problem.inverseAnchors = inverseOf(shape->anchors);
    problem.keys = reinterpret_cast<uint64_t*>(bytes);
    problem.sorted = reinterpret_cast<uint64_t*>(bytes + layout.sorted);
    problem.counts = reinterpret_cast<int32_t*>(bytes + layout.counts);
    problem.seen = reinterpret_cast<int32_t*>(bytes + layout.seen);

    auto const cudaStream = static_cast<cudaStream_t>(stream);
    char const* kernel = "findCandidates";
    // What the block shares, the tile, and what its alignment may cost.
    size_t const findBytes = sizeof(FindShared) + static_cast<size_t>(problem.tiling.sharedBytes) + sizeof(uint4);
    cudaError_t error = launch(findKernelOf(*shape, problem.tiling), shape->batch * problem.tiling.tilesPerRow,
        kFindThreads, findBytes, problem, cudaStream);
    if (error == cudaSuccess)
    {
        kernel = "selectDetections";
        error = launch(shape->deltasType == SSD_NMS_FLOAT16 ? selectDetections<Half> : selectDetections<float>,
            shape->batch, kSelectThreads, sizeof(SelectShared), problem, cudaStream);
    }
    if (error != cudaSuccess)
    {
        keepLaunchError(error, kernel);
        return SSD_NMS_LAUNCH_FAILED;
    }
    return SSD_NMS_OK;
}

char const* ssdNmsLastError()
{
    return ssd_nms::tLaunchError;
}
