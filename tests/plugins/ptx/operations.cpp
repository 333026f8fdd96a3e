//! \file operations.cpp
//! Where the lanes of a warp meet: shuffles, votes, reductions, bar.warp.sync.

#include "machine.h"

namespace ptx
{
namespace
{

constexpr uint64_t kPoison = 0xDEADBEEF; //!< What a shuffle gives from a lane that does not take part.

} // namespace

void Block::waitAtOperation(uint32_t index, Instruction const& in)
{
    Warp& warp = mWarps[index];
    uint32_t const group = warp.group;
    uint64_t const* const masks = source(index, in.sources.back(), 4, group);
    flush(warp);
    warp.ready &= ~group;
    warp.atOperation |= group;
    forLanes(group,
        [&](uint32_t lane)
        {
            warp.masks[lane] = static_cast<uint32_t>(masks[lane]);
            if ((warp.masks[lane] >> lane & 1) == 0)
            {
                report("a lane is not in the mask of its own warp operation", mPc, index * kWarpSize + lane,
                    std::to_string(warp.masks[lane]));
            }
        });
    releaseOperations(index);
    pickFurthestBehind(warp);
}

//! Performs the operations whose lanes have all arrived.
void Block::releaseOperations(uint32_t index)
{
    Warp& warp = mWarps[index];
    auto const instructionOf = [&](uint32_t lane) -> Instruction const&
    {
        return mKernel.code[static_cast<size_t>(warp.pc[lane])];
    };
    uint32_t left = warp.atOperation;
    while (left != 0)
    {
        auto const first = static_cast<uint32_t>(__builtin_ctz(left));
        uint32_t const wanted = warp.masks[first];
        Instruction const& in = instructionOf(first);
        uint32_t arrived = 0;
        forLanes(warp.atOperation,
            [&](uint32_t lane)
            {
                Instruction const& other = instructionOf(lane);
                bool const isSame = warp.masks[lane] == wanted && other.opcode == in.opcode
                    && other.variant == in.variant && other.combine == in.combine && other.type == in.type;
                arrived |= isSame ? 1U << lane : 0U;
            });
        left &= ~arrived;
        if ((wanted & ~warp.exited & ~arrived) != 0)
        {
            continue;
        }
        if ((wanted & warp.exited) != 0)
        {
            report("a lane of the mask has exited", warp.pc[first], index * kWarpSize + first, std::to_string(wanted));
        }
        for (uint32_t rest = arrived; rest != 0; rest &= rest - 1)
        {
            auto const lane = static_cast<uint32_t>(__builtin_ctz(rest));
            if (warp.pc[lane] != warp.pc[first])
            {
                report("a warp operation meets at different instructions", warp.pc[first], index * kWarpSize + first,
                    instructionOf(lane).text);
                break;
            }
        }
        performOperation(index, arrived);
        warp.atOperation &= ~arrived;
        warp.ready |= arrived;
    }
}

void Block::performOperation(uint32_t index, uint32_t members)
{
    Warp& warp = mWarps[index];
    double const now = warp.time;
    Lanes values{};
    uint32_t votes = 0;
    forLanes(members,
        [&](uint32_t lane)
        {
            mPc = warp.pc[lane];
            Instruction const& in = mKernel.code[static_cast<size_t>(mPc)];
            if (in.opcode != Opcode::kWARP_SYNC)
            {
                values[lane] = source(index, in.sources[0], 0, 1U << lane)[lane];
                votes |= (values[lane] & 1) != 0 ? 1U << lane : 0U;
            }
        });
    forLanes(members,
        [&](uint32_t lane)
        {
            mPc = warp.pc[lane];
            Instruction const& in = mKernel.code[static_cast<size_t>(mPc)];
            if (in.opcode == Opcode::kSHFL)
            {
                shuffle(index, in, lane, members, values);
            }
            else if (in.opcode == Opcode::kREDUX)
            {
                auto const first = static_cast<uint32_t>(__builtin_ctz(members));
                uint64_t result = values[first];
                forLanes(members & (members - 1),
                    [&](uint32_t other) { result = combined(in.combine, in.type, result, values[other], 0); });
                slot(index, in.targets[0])[lane] = result & UINT32_MAX;
            }
            else if (in.opcode == Opcode::kVOTE)
            {
                bool const isAll = votes == members;
                slot(index, in.targets[0])[lane] = in.variant == Variant::kBALLOT ? votes
                    : in.variant == Variant::kANY                                 ? votes != 0
                    : in.variant == Variant::kALL                                 ? isAll
                                                                                  : isAll || votes == 0;
            }
            for (int32_t const target : in.targets)
            {
                initialised(index, target) |= 1U << lane;
                warp.available[static_cast<size_t>(target)] = now + latencyOf(in);
            }
            ++warp.pc[lane];
        });
    mMemoryFree = std::max(mMemoryFree, now);
    mMemoryFree += mKernel.code[static_cast<size_t>(mPc)].opcode == Opcode::kSHFL ? 1 : 0;
}

//! PTX ISA, "shfl.sync".
void Block::shuffle(uint32_t index, Instruction const& in, uint32_t lane, uint32_t members, Lanes const& values)
{
    uint64_t const by = source(index, in.sources[1], 1, 1U << lane)[lane] & 31;
    uint64_t const clamp = source(index, in.sources[2], 2, 1U << lane)[lane];
    auto const own = static_cast<int32_t>(lane);
    auto const distance = static_cast<int32_t>(by);
    auto const segment = static_cast<int32_t>(clamp >> 8 & 31);
    int32_t const lowest = own & segment;
    int32_t const limit = lowest | (static_cast<int32_t>(clamp & 31) & ~segment & 31);
    int32_t from = 0;
    bool isInside = false;
    switch (in.variant)
    {
    case Variant::kSHUFFLE_UP:
        from = own - distance;
        isInside = from >= limit;
        break;
    case Variant::kSHUFFLE_DOWN:
        from = own + distance;
        isInside = from <= limit;
        break;
    case Variant::kSHUFFLE_XOR:
        from = own ^ distance;
        isInside = from <= limit;
        break;
    default:
        from = lowest | (distance & ~segment & 31);
        isInside = from <= limit;
    }
    from = isInside ? from : own;
    uint64_t value = values[from] & UINT32_MAX;
    if ((members >> from & 1) == 0)
    {
        report("shuffle from a lane that does not take part", mPc, index * kWarpSize + lane,
            "lane " + std::to_string(from));
        value = kPoison;
    }
    slot(index, in.targets[0])[lane] = value;
    if (in.targets.size() > 1)
    {
        slot(index, in.targets[1])[lane] = isInside ? 1 : 0;
    }
}

} // namespace ptx
