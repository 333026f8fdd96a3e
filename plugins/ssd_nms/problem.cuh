//! \file problem.cuh
//! What both kernels get, and how a row's anchors are cut into tiles.

#ifndef SSD_NMS_PROBLEM_CUH
#define SSD_NMS_PROBLEM_CUH

#include "checks.h"
#include "numerics.h"

#include <cuda_runtime.h>

// Where dynamic shared memory comes from; the emulator in tests/plugins/ has another place.
#ifndef SSD_NMS_DYNAMIC_SHARED
#define SSD_NMS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace ssd_nms
{
namespace
{

constexpr uint32_t kWholeWarp = 0xFFFFFFFFU;
constexpr int32_t kWarpSize = 32;

//! How the anchors of a row are cut into tiles, and what the tiles may hold. The same for every batch size.
struct Tiling
{
    int32_t anchorsPerTile;
    int32_t tilesPerRow;
    int32_t sharedBytes; //!< 0: the logits are read where they are.
    int64_t keysPerTile;
    int32_t lanesPerTile; //!< That read a tile's keys in selectDetections; a power of 2.
};

//! What both kernels get.
struct Problem
{
    SsdNmsParams params;
    SsdNmsShape shape;
    SsdNmsTensors tensors;
    Tiling tiling;
    int32_t foregroundClasses;
    uint32_t inverseAnchors; //!< For splitIndex().
    uint64_t* keys; //!< [B, tilesPerRow, keysPerTile]
    uint64_t* sorted; //!< The same shape: room to put a row's keys in the order of their buckets.
    int32_t* counts; //!< [B, tilesPerRow]: candidates in each tile
    int32_t* seen; //!< [B, foregroundClasses] with a cap: candidates of the class in the groups before this one
};

__device__ __forceinline__ float scoreThresholdOf(Problem const& problem, int32_t row)
{
    float const asked =
        problem.shape.hasScoreThresholds ? problem.tensors.scoreThresholds[row] : problem.params.scoreThreshold;
    return effectiveThreshold(asked, problem.params.lowestScoreThreshold);
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_PROBLEM_CUH
