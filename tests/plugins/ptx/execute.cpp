//! \file execute.cpp
//! One instruction for the lanes that run: loads, stores, atomics, jumps. Arithmetic is in compute.cpp.

#include "machine.h"

namespace ptx
{
namespace
{

constexpr uint64_t kPoison = 0xBADBADBA; //!< What a load gives that could not be made.

uint64_t loadBytes(uint8_t const* bytes, int32_t count)
{
    uint64_t value = 0;
    std::memcpy(&value, bytes, static_cast<size_t>(count));
    return value;
}

//! A loaded value as its register holds it.
uint64_t extended(uint64_t value, Type type, Type slotType)
{
    return isSigned(type) ? static_cast<uint64_t>(toSigned(value, type)) & maskOf(slotType) : value;
}

} // namespace

uint64_t const* Block::source(uint32_t warp, Operand const& operand, int32_t buffer, uint32_t mask)
{
    Lanes& copy = mBuffers[buffer];
    if (operand.isImmediate)
    {
        forLanes(~0U, [&](uint32_t lane) { copy[lane] = operand.value; });
        return copy;
    }
    if ((mask & ~initialised(warp, operand.slot)) != 0)
    {
        report("uses an uninitialised value", mPc, warp * kWarpSize, "slot " + std::to_string(operand.slot));
    }
    uint64_t const* const values = slot(warp, operand.slot);
    if (!operand.isNegated)
    {
        return values;
    }
    forLanes(~0U, [&](uint32_t lane) { copy[lane] = values[lane] == 0 ? 1 : 0; });
    return copy;
}

//! The lanes of a group whose predicate holds; all of them without one.
uint32_t Block::holds(uint32_t warp, Instruction const& in, uint32_t group, char const* what)
{
    if (in.predicate < 0)
    {
        return group;
    }
    if ((group & ~initialised(warp, in.predicate)) != 0)
    {
        report(what, mPc, warp * kWarpSize, "");
    }
    uint64_t const* const values = slot(warp, in.predicate);
    uint32_t mask = 0;
    forLanes(
        group, [&](uint32_t lane) { mask |= ((values[lane] & 1) != 0) != in.isPredicateNegated ? 1U << lane : 0U; });
    return mask;
}

void Block::execute(uint32_t index)
{
    Warp& warp = mWarps[index];
    mPc = warp.groupPc;
    Instruction const& in = mKernel.code[static_cast<size_t>(mPc)];
    countIssue(index);
    if (in.opcode == Opcode::kBRA)
    {
        jump(index, in);
        return;
    }
    uint32_t const mask = holds(index, in, warp.group, "uses an uninitialised predicate");
    if (in.predicate >= 0 && (in.isWarpOperation() || in.opcode == Opcode::kBAR || in.opcode == Opcode::kRET))
    {
        throw std::runtime_error("not supported: " + in.text);
    }
    switch (in.opcode)
    {
    case Opcode::kLD:
        load(index, in, mask);
        break;
    case Opcode::kST:
        store(index, in, mask);
        break;
    case Opcode::kATOM:
    case Opcode::kRED:
        atomic(index, in, mask);
        break;
    case Opcode::kBAR:
        waitAtBarrier(index);
        return;
    case Opcode::kSHFL:
    case Opcode::kVOTE:
    case Opcode::kREDUX:
    case Opcode::kWARP_SYNC:
        waitAtOperation(index, in);
        return;
    case Opcode::kRET:
        warp.exited |= warp.group;
        warp.ready &= ~warp.group;
        warp.group = 0;
        pickFurthestBehind(warp);
        return;
    default:
        compute(index, in, mask);
        for (int32_t const target : in.targets)
        {
            if (target >= 0)
            {
                initialised(index, target) |= mask;
                warp.available[static_cast<size_t>(target)] = mNow + latencyOf(in);
            }
        }
    }
    warp.groupPc = mPc + 1;
    advance(warp);
}

void Block::load(uint32_t index, Instruction const& in, uint32_t mask)
{
    Warp& warp = mWarps[index];
    uint64_t const* const bases = source(index, in.base, 0, mask);
    int32_t const size = bytesOf(in.type);
    int32_t const bytes = size * in.vector;
    bool const isParameter = in.space == Space::kPARAM;
    Lanes addresses;
    uint32_t invalid[4] = {};
    forLanes(mask,
        [&](uint32_t lane)
        {
            uint32_t const thread = index * kWarpSize + lane;
            addresses[lane] = bases[lane] + static_cast<uint64_t>(in.offset);
            uint8_t const* from = nullptr;
            mInvalid = 0;
            if (isParameter)
            {
                auto const offset = static_cast<int64_t>(addresses[lane]);
                if (offset < 0 || offset + bytes > mKernel.parameterBytes || offset % bytes != 0)
                {
                    report("parameter out of bounds", mPc, thread, std::to_string(offset));
                }
                else
                {
                    from = mParameters + offset;
                }
            }
            else
            {
                from = access(in, thread, addresses[lane], bytes, Access::kREAD);
            }
            for (int32_t i = 0; i < in.vector; ++i)
            {
                int32_t const target = in.targets[static_cast<size_t>(i)];
                if (target >= 0)
                {
                    slot(index, target)[lane] = from == nullptr ? kPoison
                                                                : extended(loadBytes(from + i * size, size), in.type,
                                                                      mKernel.slotTypes[static_cast<size_t>(target)]);
                }
                invalid[i] |= (mInvalid >> (i * size) & ((1U << size) - 1U)) != 0 ? 1U << lane : 0U;
            }
        });
    double ready = mNow + latencyOf(in);
    if (mSettings.hasTiming && mask != 0 && !isParameter)
    {
        ready = memoryTime(in, mask, addresses, bytes);
    }
    for (int32_t i = 0; i < in.vector; ++i)
    {
        int32_t const target = in.targets[static_cast<size_t>(i)];
        if (target >= 0)
        {
            initialised(index, target) = (initialised(index, target) | mask) & ~invalid[i];
            warp.available[static_cast<size_t>(target)] = ready;
        }
    }
}

void Block::store(uint32_t index, Instruction const& in, uint32_t mask)
{
    uint64_t const* const bases = source(index, in.base, 5, mask);
    int32_t const size = bytesOf(in.type);
    int32_t const bytes = size * in.vector;
    uint64_t const* values[4] = {};
    for (int32_t i = 0; i < in.vector; ++i)
    {
        values[i] = source(index, in.sources[static_cast<size_t>(i)], i, mask);
    }
    Lanes addresses;
    forLanes(mask,
        [&](uint32_t lane)
        {
            addresses[lane] = bases[lane] + static_cast<uint64_t>(in.offset);
            uint8_t* const to = access(in, index * kWarpSize + lane, addresses[lane], bytes, Access::kWRITE);
            for (int32_t i = 0; to != nullptr && i < in.vector; ++i)
            {
                std::memcpy(to + i * size, &values[i][lane], static_cast<size_t>(size));
            }
        });
    if (mSettings.hasTiming && mask != 0)
    {
        memoryTime(in, mask, addresses, bytes);
    }
}

void Block::atomic(uint32_t index, Instruction const& in, uint32_t mask)
{
    uint64_t const* const bases = source(index, in.base, 5, mask);
    uint64_t const* const values = source(index, in.sources.at(0), 0, mask);
    uint64_t const* const others = in.sources.size() > 1 ? source(index, in.sources[1], 1, mask) : values;
    int32_t const target = in.opcode == Opcode::kATOM ? in.targets[0] : -1;
    int32_t const size = bytesOf(in.type);
    Lanes addresses;
    auto const change = [&](uint32_t lane)
    {
        addresses[lane] = bases[lane] + static_cast<uint64_t>(in.offset);
        uint8_t* const at = access(in, index * kWarpSize + lane, addresses[lane], size, Access::kATOMIC);
        uint64_t const old = at == nullptr ? 0 : loadBytes(at, size);
        if (at != nullptr)
        {
            uint64_t const changed = combined(in.combine, in.type, old, values[lane], others[lane]);
            std::memcpy(at, &changed, static_cast<size_t>(size));
        }
        if (target >= 0)
        {
            slot(index, target)[lane] = old;
        }
    };
    // In which order the lanes of a warp add is not defined.
    bool const isBackwards = mSettings.order != Order::kLOCKSTEP && (mRandom() & 1) != 0;
    forLanes(~0U,
        [&](uint32_t i)
        {
            uint32_t const lane = isBackwards ? kWarpSize - 1 - i : i;
            if ((mask >> lane & 1) != 0)
            {
                change(lane);
            }
        });
    double const ready =
        mSettings.hasTiming && mask != 0 ? memoryTime(in, mask, addresses, size) : mNow + latencyOf(in);
    if (target >= 0)
    {
        initialised(index, target) |= mask;
        mWarps[index].available[static_cast<size_t>(target)] = ready;
    }
}

void Block::jump(uint32_t index, Instruction const& in)
{
    Warp& warp = mWarps[index];
    uint32_t const group = warp.group;
    uint32_t const taken = holds(index, in, group, "uses an uninitialised predicate");
    if (in.isUniform && taken != 0 && taken != group)
    {
        report("bra.uni diverges", mPc, index * kWarpSize, "");
    }
    if (mSettings.hasTiming && taken != 0)
    {
        warp.time += latencyOf(in) - 1;
    }
    if (taken == group || taken == 0)
    {
        warp.groupPc = taken == 0 ? mPc + 1 : in.jump;
        advance(warp);
        return;
    }
    forLanes(group, [&](uint32_t lane) { warp.pc[lane] = (taken >> lane & 1) != 0 ? in.jump : mPc + 1; });
    if (mSettings.order == Order::kLOCKSTEP)
    {
        pickFurthestBehind(warp);
        return;
    }
    bool const isTakenFirst = (mRandom() & 1) != 0;
    warp.group = isTakenFirst ? taken : group & ~taken;
    warp.groupPc = isTakenFirst ? in.jump : mPc + 1;
}

} // namespace ptx
