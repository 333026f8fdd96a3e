//! \file timing.cpp
//! A model of one block alone on an in-order multiprocessor, roughly Hopper's. It is not calibrated: good for comparing
//! two versions of a kernel, never for a time.

#include "machine.h"

#include <algorithm>
#include <array>
#include <set>

namespace ptx
{
namespace
{

// Cycles until a result is there.
constexpr double kArithmetic = 4.5;
constexpr double kProduct64 = 12;
constexpr double kConversion = 12;
constexpr double kDivision = 36;
constexpr double kReciprocal = 30;
constexpr double kWholeDivision = 90;
constexpr double kShuffle = 24;
constexpr double kVote = 12;
constexpr double kJump = 8;
constexpr double kSharedLoad = 29;
constexpr double kGenericLoad = 36; //!< Of shared memory, by a generic address.
constexpr double kSharedAtomic = 60;
constexpr double kL1 = 38;
constexpr double kL2 = 270;
constexpr double kDram = 640;

bool isWideNumber(Instruction const& in)
{
    return bytesOf(in.type) == 8;
}

bool touchesFloats(Instruction const& in)
{
    return isFloat(in.type) || isFloat(in.sourceType);
}

} // namespace

double costOf(Instruction const& in)
{
    switch (in.opcode)
    {
    case Opcode::kMOV:
    case Opcode::kCVTA:
    case Opcode::kCVTA_TO:
        return 0.25;
    case Opcode::kDIV:
        return isFloat(in.type) ? 9 : isWideNumber(in) ? 60 : 16;
    case Opcode::kRCP:
        return 6;
    case Opcode::kMUL:
    case Opcode::kMAD:
    case Opcode::kMUL_HI:
        return isFloat(in.type) ? 1 : isWideNumber(in) ? 4 : 2;
    case Opcode::kMUL_WIDE:
        return 2;
    case Opcode::kADD:
    case Opcode::kSUB:
    case Opcode::kNEG:
    case Opcode::kAND:
    case Opcode::kOR:
    case Opcode::kXOR:
    case Opcode::kNOT:
    case Opcode::kSHL:
    case Opcode::kSHR:
    case Opcode::kSELP:
    case Opcode::kSETP:
    case Opcode::kMIN:
    case Opcode::kMAX:
        return in.type == Type::kPRED ? 0.5 : isWideNumber(in) ? 2 : 1;
    case Opcode::kCVT:
        return touchesFloats(in) ? 2 : 0.5;
    case Opcode::kPOPC:
    case Opcode::kCLZ:
        return isWideNumber(in) ? 4 : 2;
    default:
        return 1;
    }
}

double latencyOf(Instruction const& in)
{
    switch (in.opcode)
    {
    case Opcode::kMOV:
    case Opcode::kCVTA:
    case Opcode::kCVTA_TO:
        return 1;
    case Opcode::kDIV:
        return isFloat(in.type) ? kDivision : kWholeDivision;
    case Opcode::kRCP:
        return kReciprocal;
    case Opcode::kCVT:
        return touchesFloats(in) ? kConversion : 2;
    case Opcode::kPOPC:
    case Opcode::kCLZ:
        return kConversion * 1.5;
    case Opcode::kMUL:
    case Opcode::kMAD:
        return isWideNumber(in) ? kProduct64 : kArithmetic;
    case Opcode::kSHFL:
        return kShuffle;
    case Opcode::kVOTE:
    case Opcode::kREDUX:
        return kVote;
    case Opcode::kBRA:
        return kJump;
    case Opcode::kLD:
        return kArithmetic; // of a parameter; memoryTime() says it of others
    default:
        return isWideNumber(in) ? kArithmetic * 1.5 : kArithmetic;
    }
}

double Block::issueTime(uint32_t index) const
{
    Warp const& warp = mWarps[index];
    Instruction const& in = mKernel.code[static_cast<size_t>(warp.groupPc)];
    double time = std::max(warp.time, mSchedulers[index % 4]);
    auto const wait = [&](int32_t slot)
    {
        time = slot < 0 ? time : std::max(time, warp.available[static_cast<size_t>(slot)]);
    };
    for (Operand const& operand : in.sources)
    {
        wait(operand.slot);
    }
    wait(in.base.slot);
    wait(in.predicate);
    if (in.opcode == Opcode::kLD || in.opcode == Opcode::kATOM)
    {
        std::for_each(in.targets.begin(), in.targets.end(), wait);
    }
    return time;
}

void Block::countIssue(uint32_t index)
{
    Warp& warp = mWarps[index];
    Counter& counter = mCounters[static_cast<size_t>(warp.groupPc)];
    ++counter.issues;
    counter.lanes += static_cast<uint64_t>(__builtin_popcount(warp.group));
    ++warp.issues;
    ++warp.intervalIssues;
    ++mLaunch.issues;
    if (mSettings.hasTiming)
    {
        double const cost = costOf(mKernel.code[static_cast<size_t>(warp.groupPc)]);
        mNow = issueTime(index);
        counter.stall += mNow - warp.time;
        mSchedulers[index % 4] = mNow + cost;
        warp.time = mNow + std::max(1.0, cost);
    }
}

double Block::sharedTime(Instruction const& in, uint32_t mask, Lanes const& addresses, int32_t bytes)
{
    constexpr uint64_t kBanks = 32;
    uint32_t const together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8; // lanes of one wavefront
    uint64_t wavefronts = 0;
    for (uint32_t first = 0; first < kWarpSize; first += together)
    {
        uint32_t const lanes = mask & (~0U >> (kWarpSize - together)) << first;
        std::array<std::vector<uint64_t>, kBanks> words;
        std::map<uint64_t, size_t> same;
        size_t degree = lanes != 0 ? 1 : 0;
        forLanes(lanes,
            [&](uint32_t lane)
            {
                for (uint64_t i = 0; i < static_cast<uint64_t>(std::max(1, bytes / 4)); ++i)
                {
                    uint64_t const word = addresses[lane] / 4 + i;
                    auto& bank = words[word % kBanks];
                    if (std::find(bank.begin(), bank.end(), word) == bank.end())
                    {
                        bank.push_back(word);
                    }
                    degree = std::max(degree, bank.size());
                }
                degree = in.isAtomic() ? std::max(degree, ++same[addresses[lane]]) : degree;
            });
        wavefronts += degree;
    }
    mCounters[static_cast<size_t>(mPc)].wavefronts += wavefronts;
    mMemoryFree = std::max(mNow, mMemoryFree) + static_cast<double>(wavefronts) * (in.isAtomic() ? 2 : 1);
    return mMemoryFree - 1 + (in.isAtomic() ? kSharedAtomic : in.space == Space::kGENERIC ? kGenericLoad : kSharedLoad);
}

//! Counts wavefronts and sectors of an access.
//! \return when its data are there.
double Block::memoryTime(Instruction const& in, uint32_t mask, Lanes const& addresses, int32_t bytes)
{
    Counter& counter = mCounters[static_cast<size_t>(mPc)];
    ++counter.requests;
    if (sharedOffset(in, addresses[__builtin_ctz(mask)]) != UINT64_MAX)
    {
        return sharedTime(in, mask, addresses, bytes);
    }
    std::set<uint64_t> sectors;
    std::set<uint64_t> lines;
    forLanes(mask,
        [&](uint32_t lane)
        {
            uint64_t const last = (addresses[lane] + static_cast<uint64_t>(bytes) - 1) / 32;
            for (uint64_t sector = addresses[lane] / 32; sector <= last; ++sector)
            {
                sectors.insert(sector);
                lines.insert(sector / 4);
            }
        });
    counter.sectors += sectors.size();
    counter.wavefronts += lines.size();
    double done = std::max(mNow, mMemoryFree);
    mMemoryFree = done + static_cast<double>(lines.size());
    for (uint64_t const sector : sectors)
    {
        auto const cached = mCache.find(sector);
        double arrival = 0;
        if (cached != mCache.end())
        {
            arrival = std::max(cached->second, mMemoryFree + kL1);
        }
        else
        {
            Allocation const* const found = find(sector * 32, 1); // the model wants aligned tensors
            bool const isInL2 = found != nullptr && !found->isReadOnly; // the first kernel wrote it
            arrival = mMemoryFree + (isInL2 ? kL2 : kDram);
        }
        if (in.opcode == Opcode::kLD)
        {
            mCache[sector] = arrival;
        }
        else if (in.opcode == Opcode::kST)
        {
            mCache.erase(sector);
        }
        done = std::max(done, arrival);
    }
    return done;
}

} // namespace ptx
