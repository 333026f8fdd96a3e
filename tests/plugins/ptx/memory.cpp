//! \file memory.cpp
//! Accesses to memory, and what can be wrong with them.
//!
//! Races: between two barriers of a block, what one thread writes no other one may touch, unless all do so by atomics.
//! The blocks of a launch share nothing that one of them writes.

#include "machine.h"

#include <algorithm>

namespace ptx
{
namespace
{

constexpr uint16_t kSeveral = 0xFFFF; //!< Threads or, as 32 bits, blocks.
constexpr uint64_t kNear = 4096; //!< Bytes within which an access out of bounds is told as one beside an allocation.

std::string number(uint64_t value)
{
    return std::to_string(value);
}

} // namespace

void Block::report(std::string const& kind, int32_t pc, uint32_t thread, std::string const& detail)
{
    Instruction const& in = mKernel.code[static_cast<size_t>(pc)];
    std::string place = " | " + mKernel.name + " | pc " + std::to_string(pc) + " line " + std::to_string(in.place.line);
    if (in.place.callerLine != 0)
    {
        place += "@" + std::to_string(in.place.callerLine);
    }
    Finding& finding = mWorld.findings[kind + place + " | " + in.text];
    if (finding.count++ == 0)
    {
        finding.first = "block " + number(mIndex) + " thread " + number(thread) + ": " + detail;
    }
}

void Block::checkGlobal(Allocation& allocation, uint64_t offset, int32_t bytes, uint32_t thread, Access kind)
{
    auto const own = static_cast<uint16_t>(thread);
    uint32_t const earlier = mWorld.blockCount;
    auto const where = [&]
    {
        return allocation.name + "+" + number(offset);
    };
    for (uint64_t word = offset / 4; word <= (offset + static_cast<uint64_t>(bytes) - 1) / 4; ++word)
    {
        Shadow& shadow = allocation.shadows[word];
        if (!shadow.isInitialised && kind == Access::kREAD)
        {
            for (int32_t i = 0; i < bytes; ++i)
            {
                mInvalid |= (offset + static_cast<uint64_t>(i)) / 4 == word ? 1U << i : 0U;
            }
        }
        if (!shadow.isInitialised && kind == Access::kATOMIC)
        {
            report("atomic on uninitialised global memory", mPc, thread, where());
        }
        bool const isWritten = shadow.writeBlock > earlier
            && (shadow.writeBlock != mNumber || (shadow.writeEpoch == mWorld.epoch && shadow.writer != own));
        if (isWritten && !(kind == Access::kATOMIC && shadow.isAtomic))
        {
            report(std::string{"race: "} + (kind == Access::kREAD ? "read" : "write") + " after write in global memory",
                mPc, thread,
                where() + ", other block " + number(shadow.writeBlock - earlier - 1) + " thread "
                    + number(shadow.writer));
        }
        bool const isRead = shadow.readBlock > earlier
            && (shadow.readBlock != mNumber || (shadow.readEpoch == mWorld.epoch && shadow.reader != own));
        if (isRead && kind != Access::kREAD)
        {
            report("race: write after read in global memory", mPc, thread, where());
        }
        if (kind == Access::kREAD)
        {
            if (shadow.readBlock == mNumber && shadow.readEpoch == mWorld.epoch)
            {
                shadow.reader = shadow.reader == own ? own : kSeveral;
            }
            else if (shadow.readBlock > earlier && shadow.readBlock != mNumber)
            {
                shadow.readBlock = UINT32_MAX;
            }
            else
            {
                shadow.readBlock = mNumber;
                shadow.readEpoch = mWorld.epoch;
                shadow.reader = own;
            }
            continue;
        }
        bool const isAgain = shadow.writeBlock == mNumber && shadow.writeEpoch == mWorld.epoch && shadow.writer != own;
        shadow.writer = isAgain ? kSeveral : own;
        shadow.writeBlock = mNumber;
        shadow.writeEpoch = mWorld.epoch;
        shadow.isAtomic = kind == Access::kATOMIC;
        shadow.isInitialised = true;
    }
}

void Block::checkShared(uint64_t offset, int32_t bytes, uint32_t thread, Access kind)
{
    auto const own = static_cast<uint16_t>(thread);
    for (int32_t i = 0; i < bytes; ++i)
    {
        uint64_t const place = offset + static_cast<uint64_t>(i);
        Shadow& shadow = mSharedShadows[place];
        if (!shadow.isInitialised && kind == Access::kREAD)
        {
            mInvalid |= 1U << i;
        }
        if (!shadow.isInitialised && kind == Access::kATOMIC)
        {
            report("atomic on uninitialised shared memory", mPc, thread, "offset " + number(place));
        }
        bool const isWritten = shadow.writeEpoch == mWorld.epoch && shadow.writer != own;
        if (isWritten && !(kind == Access::kATOMIC && shadow.isAtomic))
        {
            report(std::string{"race: "} + (kind == Access::kREAD ? "read" : "write") + " after write in shared memory",
                mPc, thread, "offset " + number(place) + ", other thread " + number(shadow.writer));
        }
        if (kind == Access::kREAD)
        {
            bool const isFirst = shadow.readEpoch != mWorld.epoch;
            shadow.reader = isFirst || shadow.reader == own ? own : kSeveral;
            shadow.readEpoch = mWorld.epoch;
            continue;
        }
        if (shadow.readEpoch == mWorld.epoch && shadow.reader != own)
        {
            report("race: write after read in shared memory", mPc, thread,
                "offset " + number(place) + ", other thread " + number(shadow.reader));
        }
        shadow.writer = isWritten ? kSeveral : own;
        shadow.writeEpoch = mWorld.epoch;
        shadow.isAtomic = kind == Access::kATOMIC;
        shadow.isInitialised = true;
    }
}

Allocation* Block::find(uint64_t address, uint64_t bytes)
{
    auto const isIn = [&](Allocation const& allocation)
    {
        return address >= allocation.base && address + bytes <= allocation.base + allocation.size;
    };
    auto& all = mWorld.allocations;
    if (mLastFound >= all.size() || !isIn(all[mLastFound]))
    {
        auto const found = std::find_if(all.begin(), all.end(), isIn);
        if (found == all.end())
        {
            return nullptr;
        }
        mLastFound = static_cast<size_t>(found - all.begin());
    }
    return &all[mLastFound];
}

//! The offset from the beginning of shared memory, or UINT64_MAX where the address is a global one.
uint64_t Block::sharedOffset(Instruction const& in, uint64_t address) const
{
    bool const isInWindow = address >= kSharedWindow && address < kSharedWindow + kSharedWindowBytes;
    if (in.space == Space::kGENERIC && isInWindow)
    {
        return address - kSharedWindow - kSharedBase;
    }
    return in.space == Space::kSHARED ? (address & UINT32_MAX) - kSharedBase : UINT64_MAX;
}

//! One thread's access.
//! \return where the bytes are, or null after a report.
uint8_t* Block::access(Instruction const& in, uint32_t thread, uint64_t address, int32_t bytes, Access kind)
{
    auto const size = static_cast<uint64_t>(bytes);
    if (address % size != 0)
    {
        report("misaligned access", mPc, thread, "address " + number(address));
    }
    uint64_t const offset = sharedOffset(in, address);
    if (offset != UINT64_MAX)
    {
        if (offset > mShared.size() || offset + size > mShared.size())
        {
            report("shared access out of bounds", mPc, thread,
                "offset " + std::to_string(static_cast<int64_t>(offset)) + " of " + number(mShared.size()));
            return nullptr;
        }
        if (mSettings.hasChecks)
        {
            checkShared(offset, bytes, thread, kind);
        }
        return &mShared[offset];
    }
    Allocation* const found = find(address, size);
    if (found == nullptr)
    {
        std::string near = "?";
        for (Allocation const& each : mWorld.allocations)
        {
            if (address + kNear >= each.base && address < each.base + each.size + kNear)
            {
                near = each.name + " at " + std::to_string(static_cast<int64_t>(address - each.base)) + " of "
                    + number(each.size);
            }
        }
        report("global access out of bounds", mPc, thread, near);
        return nullptr;
    }
    if (found->isReadOnly && kind != Access::kREAD)
    {
        report("writes an input", mPc, thread, found->name);
        return nullptr;
    }
    if (!found->isReadOnly && mSettings.hasChecks)
    {
        checkGlobal(*found, address - found->base, bytes, thread, kind);
    }
    if (mSettings.hasTiming)
    {
        (kind == Access::kREAD ? found->sectorsRead : found->sectorsWritten)[(address - found->base) / 32] = true;
    }
    return reinterpret_cast<uint8_t*>(address);
}

} // namespace ptx
