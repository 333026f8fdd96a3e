//! \file schedule.cpp
//! Which warp and which of its lanes go on; barriers.

#include "machine.h"

#include <algorithm>

namespace ptx
{
namespace
{

constexpr uint64_t kUnset = 0xC5C5C5C5C5C5C5C5; //!< What a register holds before it is written.
constexpr int32_t kLockstepBurst = 4096;

} // namespace

Block::Block(World& world, Kernel const& kernel, Launch& launch, uint8_t const* parameters, uint32_t index)
    : mWorld{world}
    , mSettings{world.settings}
    , mKernel{kernel}
    , mLaunch{launch}
    , mParameters{parameters}
    , mIndex{index}
    , mNumber{world.blockCount + index + 1}
    , mThreads{launch.threads}
    , mSlots{kernel.slotTypes.size()}
    , mRandom{world.settings.seed * 1000003 + index * 31 + world.launchCount}
    , mCounters{world.counters[kernel.name]}
{
}

void Block::setSpecial(uint32_t warp, char const* name, uint64_t first, uint64_t step)
{
    int32_t const index = mKernel.slots.at(name);
    initialised(warp, index) = ~0U;
    uint64_t* const values = slot(warp, index);
    forLanes(~0U, [&](uint32_t lane) { values[lane] = first + step * lane; });
}

void Block::initialise()
{
    uint32_t const warps = (mThreads + kWarpSize - 1) / kWarpSize;
    mRegisters.assign(warps * mSlots * kWarpSize, kUnset);
    mInitialised.assign(warps * mSlots, 0);
    mWarps.assign(warps, Warp{});
    mShared.resize(mLaunch.sharedBytes);
    std::generate(mShared.begin(), mShared.end(), [&] { return static_cast<uint8_t>(mRandom()); });
    mSharedShadows.assign(mLaunch.sharedBytes, Shadow{});
    for (uint32_t i = 0; i < warps; ++i)
    {
        Warp& warp = mWarps[i];
        warp.available.assign(mSlots, 0);
        uint32_t const lanes = std::min(kWarpSize, mThreads - i * kWarpSize);
        warp.ready = ~0U >> (kWarpSize - lanes);
        warp.exited = ~warp.ready;
        setSpecial(i, "%tid.x", i * kWarpSize, 1);
        setSpecial(i, "%tid.y", 0, 0);
        setSpecial(i, "%tid.z", 0, 0);
        setSpecial(i, "%ctaid.x", mIndex, 0);
        setSpecial(i, "%ntid.x", mThreads, 0);
        setSpecial(i, "%nctaid.x", mLaunch.blocks, 0);
        setSpecial(i, "%laneid", 0, 1);
        uint64_t* const lower = slot(i, mKernel.slots.at("%lanemask_lt"));
        initialised(i, mKernel.slots.at("%lanemask_lt")) = ~0U;
        forLanes(~0U, [&](uint32_t lane) { lower[lane] = (uint64_t{1} << lane) - 1; });
        pickFurthestBehind(warp);
    }
}

//! Writes back where the lanes of the group are.
void Block::flush(Warp& warp)
{
    forLanes(warp.group, [&](uint32_t lane) { warp.pc[lane] = warp.groupPc; });
    warp.group = 0;
}

//! In lockstep, the lanes that are furthest behind go on.
void Block::pickFurthestBehind(Warp& warp)
{
    if (mSettings.order != Order::kLOCKSTEP || warp.ready == 0)
    {
        return;
    }
    int32_t first = INT32_MAX;
    forLanes(warp.ready, [&](uint32_t lane) { first = std::min(first, warp.pc[lane]); });
    warp.group = 0;
    warp.groupPc = first;
    warp.othersFirst = INT32_MAX;
    forLanes(warp.ready,
        [&](uint32_t lane)
        {
            if (warp.pc[lane] == first)
            {
                warp.group |= 1U << lane;
            }
            else
            {
                warp.othersFirst = std::min(warp.othersFirst, warp.pc[lane]);
            }
        });
}

//! After each instruction: in lockstep, others may now be as far behind.
void Block::advance(Warp& warp)
{
    if (mSettings.order == Order::kLOCKSTEP && warp.groupPc >= warp.othersFirst)
    {
        flush(warp);
        pickFurthestBehind(warp);
    }
}

//! \return the warp that goes on, or -1: none can.
int32_t Block::chooseWarp()
{
    std::vector<int32_t> able;
    double best = 0;
    int32_t soonest = -1;
    for (uint32_t i = 0; i < mWarps.size(); ++i)
    {
        if (mWarps[i].ready == 0)
        {
            continue;
        }
        if (mSettings.hasTiming)
        {
            double const time = issueTime(i);
            soonest = soonest < 0 || time < best ? static_cast<int32_t>(i) : soonest;
            best = soonest == static_cast<int32_t>(i) ? time : best;
            continue;
        }
        able.push_back(static_cast<int32_t>(i));
        if (mSettings.order == Order::kLOCKSTEP || mSettings.order == Order::kFIRST_FIRST)
        {
            break;
        }
    }
    if (mSettings.hasTiming || able.empty())
    {
        return soonest;
    }
    bool const isRandom = mSettings.order == Order::kRANDOM;
    return isRandom ? able[mRandom() % able.size()] : able.back();
}

//! Lets a group of a warp's lanes run for a while.
void Block::runGroup(uint32_t index)
{
    Warp& warp = mWarps[index];
    int64_t burst = mSettings.hasTiming ? 1 : kLockstepBurst;
    if (mSettings.order != Order::kLOCKSTEP)
    {
        uint32_t rest = warp.ready;
        for (uint64_t skip = mRandom() % static_cast<uint64_t>(__builtin_popcount(rest)); skip > 0; --skip)
        {
            rest &= rest - 1;
        }
        auto const first = static_cast<uint32_t>(__builtin_ctz(rest));
        uint32_t group = 0;
        forLanes(warp.ready, [&](uint32_t lane) { group |= warp.pc[lane] == warp.pc[first] ? 1U << lane : 0U; });
        if (static_cast<int32_t>(mRandom() % 100) < mSettings.subset)
        {
            group &= static_cast<uint32_t>(mRandom()) | 1U << first;
        }
        warp.group = group;
        warp.groupPc = warp.pc[first];
        burst = 1 + static_cast<int64_t>(mRandom() % static_cast<uint64_t>(2 * mSettings.burst - 1));
    }
    for (; warp.group != 0 && burst > 0; --burst)
    {
        execute(index);
    }
    if (mSettings.order != Order::kLOCKSTEP)
    {
        flush(warp);
    }
}

void Block::run()
{
    ++mWorld.epoch;
    initialise();
    while (true)
    {
        int32_t const warp = chooseWarp();
        if (warp >= 0)
        {
            runGroup(static_cast<uint32_t>(warp));
            if (mSettings.most != 0 && mLaunch.issues > mSettings.most)
            {
                throw std::runtime_error("a block runs for too long");
            }
            continue;
        }
        bool const isStuck =
            std::any_of(mWarps.begin(), mWarps.end(), [](Warp const& each) { return each.atOperation != 0; });
        if (isStuck)
        {
            failDeadlock();
        }
        bool const isWaiting =
            std::any_of(mWarps.begin(), mWarps.end(), [](Warp const& each) { return each.atBarrier != 0; });
        if (!isWaiting)
        {
            break;
        }
        releaseBarrier();
    }
    double end = 0;
    for (Warp const& warp : mWarps)
    {
        end = std::max(end, warp.time);
    }
    mLaunch.blockCycles.push_back(end);
    mLaunch.intervals.push_back(Interval{-1, end - mIntervalStart, 0, 0});
}

void Block::waitAtBarrier(uint32_t index)
{
    Warp& warp = mWarps[index];
    uint32_t const group = warp.group;
    flush(warp);
    warp.atBarrier |= group;
    warp.ready &= ~group;
    pickFurthestBehind(warp);
}

void Block::failDeadlock()
{
    for (uint32_t i = 0; i < mWarps.size(); ++i)
    {
        Warp const& warp = mWarps[i];
        if (warp.atOperation != 0)
        {
            auto const lane = static_cast<uint32_t>(__builtin_ctz(warp.atOperation));
            report("deadlock: not all lanes of the mask reach a warp operation", warp.pc[lane], i * kWarpSize + lane,
                std::to_string(warp.masks[lane]));
        }
    }
    throw std::runtime_error("deadlock in a warp operation");
}

//! Reports what is wrong with the barrier at which all threads that are left wait.
//! \param pc gets the instruction.
void Block::checkBarrier(int32_t& pc)
{
    pc = -1;
    auto padding = static_cast<int32_t>(mWarps.size() * kWarpSize - mThreads);
    int32_t exited = -padding;
    for (Warp const& warp : mWarps)
    {
        exited += __builtin_popcount(warp.exited);
    }
    for (uint32_t i = 0; i < mWarps.size(); ++i)
    {
        Warp const& warp = mWarps[i];
        int32_t own = -1;
        forLanes(warp.atBarrier,
            [&](uint32_t lane)
            {
                int32_t const at = warp.pc[lane];
                uint32_t const thread = i * kWarpSize + lane;
                if (exited > 0 && pc < 0)
                {
                    report("threads wait at a barrier that others exited without", at, thread, std::to_string(exited));
                }
                if (own >= 0 && at != own)
                {
                    report("lanes of a warp wait at different barriers", at, thread, std::to_string(own));
                }
                if (own < 0 && pc >= 0 && at != pc)
                {
                    report("warps wait at different barriers", at, thread, std::to_string(pc));
                }
                own = at;
                pc = at;
            });
    }
}

void Block::releaseBarrier()
{
    constexpr double kBarrierCycles = 18;
    int32_t pc;
    checkBarrier(pc);
    Interval interval{pc, 0, 0, 0};
    double last = 0;
    for (Warp const& warp : mWarps)
    {
        last = std::max(last, warp.time);
        interval.issues += warp.intervalIssues;
        interval.mostOfWarp = std::max(interval.mostOfWarp, warp.intervalIssues);
    }
    double const end = last + kBarrierCycles;
    interval.cycles = end - mIntervalStart;
    mIntervalStart = end;
    mLaunch.intervals.push_back(interval);
    ++mLaunch.barriers;
    for (Warp& warp : mWarps)
    {
        mCounters[static_cast<size_t>(pc)].stall += end - warp.time;
        warp.time = mSettings.hasTiming ? end : 0;
        warp.intervalIssues = 0;
        forLanes(warp.atBarrier, [&](uint32_t lane) { ++warp.pc[lane]; });
        warp.ready |= warp.atBarrier;
        warp.atBarrier = 0;
        pickFurthestBehind(warp);
    }
    ++mWorld.epoch;
}

} // namespace ptx
