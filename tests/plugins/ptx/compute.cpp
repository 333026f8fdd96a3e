//! \file compute.cpp
//! Arithmetic, comparisons, conversions and moves between registers.

#include "machine.h"

#include <algorithm>
#include <cmath>

namespace ptx
{
namespace
{

//! Exact, with subnormals.
float fromHalf(uint16_t bits)
{
    uint32_t const sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
    uint32_t const exponent = bits >> 10 & 0x1FU;
    uint32_t const mantissa = bits & 0x3FFU;
    if (exponent == 0)
    {
        float const value = std::ldexp(static_cast<float>(mantissa), -24);
        return sign != 0 ? -value : value;
    }
    uint32_t const wide = exponent == 0x1F ? 0xFFU : exponent + 112;
    return toFloat(sign | wide << 23 | mantissa << 13);
}

uint64_t bitField(uint64_t value, uint64_t position, uint64_t length, Type type)
{
    auto const bits = static_cast<uint64_t>(8 * bytesOf(type));
    uint64_t const last = std::min(position + length - 1, bits - 1);
    uint64_t const sign = isSigned(type) && length != 0 ? value >> last & 1 : 0;
    uint64_t result = 0;
    for (uint64_t i = 0; i < bits; ++i)
    {
        bool const isInField = i < length && position + i < bits;
        result |= (isInField ? value >> (position + i) & 1 : sign) << i;
    }
    return result;
}

uint64_t inserted(uint64_t field, uint64_t value, uint64_t position, uint64_t length, Type type)
{
    auto const bits = static_cast<uint64_t>(8 * bytesOf(type));
    for (uint64_t i = 0; i < length && position + i < bits; ++i)
    {
        uint64_t const place = uint64_t{1} << (position + i);
        value = (value & ~place) | ((field >> i & 1) != 0 ? place : 0);
    }
    return value;
}

uint64_t permuted(uint64_t a, uint64_t b, uint64_t selector)
{
    uint64_t const bytes = (b & UINT32_MAX) << 32 | (a & UINT32_MAX);
    uint64_t result = 0;
    for (uint32_t i = 0; i < 4; ++i)
    {
        uint64_t const choice = selector >> (4 * i) & 0xF;
        uint64_t byte = bytes >> (8 * (choice & 7)) & 0xFF;
        byte = (choice & 8) == 0 ? byte : (byte & 0x80) != 0 ? 0xFF : 0;
        result |= byte << (8 * i);
    }
    return result;
}

uint64_t looked(uint64_t a, uint64_t b, uint64_t c, int32_t table)
{
    uint64_t result = 0;
    for (uint32_t i = 0; i < 32; ++i)
    {
        uint64_t const entry = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
        result |= (static_cast<uint64_t>(table) >> entry & 1) << i;
    }
    return result;
}

uint64_t reversed(uint64_t value, int32_t bits)
{
    uint64_t result = 0;
    for (int32_t i = 0; i < bits; ++i)
    {
        result |= (value >> i & 1) << (bits - 1 - i);
    }
    return result;
}

uint64_t highHalf(uint64_t a, uint64_t b, Type type)
{
    int32_t const bits = 8 * bytesOf(type);
    if (isSigned(type))
    {
        return static_cast<uint64_t>(static_cast<__int128>(toSigned(a, type)) * toSigned(b, type) >> bits);
    }
    uint64_t const mask = maskOf(type);
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a & mask) * (b & mask) >> bits);
}

uint64_t wideProduct(uint64_t a, uint64_t b, Type type)
{
    uint64_t const mask = maskOf(type);
    return isSigned(type) ? static_cast<uint64_t>(toSigned(a, type) * toSigned(b, type)) : (a & mask) * (b & mask);
}

float rounded(float value, Variant variant)
{
    switch (variant)
    {
    case Variant::kNEAREST:
        return std::nearbyint(value);
    case Variant::kTO_ZERO:
        return std::trunc(value);
    case Variant::kDOWN:
        return std::floor(value);
    case Variant::kUP:
        return std::ceil(value);
    default:
        return value;
    }
}

//! A product and a quotient of halves are not needed: a pair of halves is only compared.
uint64_t pairOf(uint64_t a, uint64_t b, float (*choose)(float, float))
{
    uint64_t result = 0;
    for (int32_t shift = 0; shift < 32; shift += 16)
    {
        auto const x = static_cast<uint16_t>(a >> shift);
        auto const y = static_cast<uint16_t>(b >> shift);
        float const first = fromHalf(x);
        float const second = fromHalf(y);
        float const chosen = choose(first, second);
        bool const isFirst = fromFloat(chosen) == fromFloat(first);
        result |= static_cast<uint64_t>(chosen != chosen ? 0x7FFFU : isFirst ? x : y) << shift;
    }
    return result;
}

} // namespace

void Block::convert(Instruction const& in, uint32_t mask, uint64_t* target, uint64_t const* source)
{
    Type const to = in.type;
    Type const from = in.sourceType;
    forLanes(mask,
        [&](uint32_t lane)
        {
            uint64_t const value = source[lane];
            if (to == Type::kF32 && from == Type::kF16)
            {
                target[lane] = fromFloat(fromHalf(static_cast<uint16_t>(value)));
            }
            else if (to == Type::kF32 && from == Type::kF32)
            {
                target[lane] = fromFloat(rounded(toFloat(value), in.variant));
            }
            else if (to == Type::kF32)
            {
                target[lane] = fromFloat(isSigned(from) ? static_cast<float>(toSigned(value, from))
                                                        : static_cast<float>(value & maskOf(from)));
            }
            else if (from == Type::kF32 && bytesOf(to) == 4)
            {
                double const whole = rounded(toFloat(value), in.variant);
                double const low = isSigned(to) ? INT32_MIN : 0;
                double const high = isSigned(to) ? INT32_MAX : UINT32_MAX;
                double const clamped = whole != whole ? 0 : std::min(std::max(whole, low), high);
                target[lane] = static_cast<uint64_t>(static_cast<int64_t>(clamped)) & UINT32_MAX;
            }
            else if (!isFloat(to) && !isFloat(from))
            {
                uint64_t const wide =
                    isSigned(from) ? static_cast<uint64_t>(toSigned(value, from)) : value & maskOf(from);
                target[lane] = wide & maskOf(to);
            }
            else
            {
                throw std::runtime_error("not supported: " + in.text);
            }
        });
}

void Block::compute(uint32_t warp, Instruction const& in, uint32_t mask)
{
    Type const type = in.type;
    bool const isReal = type == Type::kF32;
    uint64_t const bits = static_cast<uint64_t>(8 * bytesOf(type));
    uint64_t const kept = maskOf(type);
    uint64_t* const target = in.targets.empty() || in.targets[0] < 0 ? mBuffers[5] : slot(warp, in.targets[0]);
    uint64_t const* s[4] = {};
    bool const isSelect = in.opcode == Opcode::kSELP; // what is not chosen need not be initialised
    for (size_t i = 0; i < in.sources.size() && i < 4; ++i)
    {
        s[i] = source(warp, in.sources[i], static_cast<int32_t>(i), isSelect && i < 2 ? 0 : mask);
    }
    uint64_t const* const a = s[0];
    uint64_t const* const b = s[1];
    uint64_t const* const c = s[2];
    auto const each = [&](auto function)
    {
        forLanes(mask, [&](uint32_t lane) { target[lane] = function(lane) & kept; });
    };
    auto const real = [&](auto function)
    {
        forLanes(mask, [&](uint32_t lane) { target[lane] = fromFloat(function(toFloat(a[lane]), lane)); });
    };
    auto const both = [&](auto ofReal, auto ofWhole)
    {
        if (isReal)
        {
            real([&](float x, uint32_t lane) { return ofReal(x, toFloat(b[lane])); });
        }
        else
        {
            each([&](uint32_t lane) { return ofWhole(a[lane], b[lane]); });
        }
    };
    auto const wide = [&](auto function)
    {
        uint64_t const all = bits == 32 ? ~uint64_t{0} : UINT32_MAX;
        forLanes(mask, [&](uint32_t lane) { target[lane] = function(lane) & all; });
    };
    auto const divided = [&](bool isRest)
    {
        each(
            [&](uint32_t lane)
            {
                uint64_t const divisor = b[lane] & kept;
                if (divisor == 0)
                {
                    report("integer division by zero", mPc, warp * kWarpSize + lane, "");
                    return isRest ? a[lane] : kept;
                }
                if (!isSigned(type))
                {
                    uint64_t const dividend = a[lane] & kept;
                    return isRest ? dividend % divisor : dividend / divisor;
                }
                int64_t const x = toSigned(a[lane], type);
                int64_t const y = toSigned(b[lane], type);
                return static_cast<uint64_t>(y == -1 ? (isRest ? 0 : -x) : isRest ? x % y : x / y);
            });
    };
    switch (in.opcode)
    {
    case Opcode::kADD:
        both([](float x, float y) { return x + y; }, [](uint64_t x, uint64_t y) { return x + y; });
        break;
    case Opcode::kSUB:
        both([](float x, float y) { return x - y; }, [](uint64_t x, uint64_t y) { return x - y; });
        break;
    case Opcode::kMUL:
        both([](float x, float y) { return x * y; }, [](uint64_t x, uint64_t y) { return x * y; });
        break;
    case Opcode::kMIN:
        both(smallerOf, [&](uint64_t x, uint64_t y) { return compareNumbers(Compare::kLT, type, x, y) ? x : y; });
        break;
    case Opcode::kMAX:
        both(largerOf, [&](uint64_t x, uint64_t y) { return compareNumbers(Compare::kLT, type, x, y) ? y : x; });
        break;
    case Opcode::kMIN_PAIR:
        each([&](uint32_t l) { return pairOf(a[l], b[l], smallerOf); });
        break;
    case Opcode::kMAX_PAIR:
        each([&](uint32_t l) { return pairOf(a[l], b[l], largerOf); });
        break;
    case Opcode::kMUL_HI:
        each([&](uint32_t l) { return highHalf(a[l], b[l], type); });
        break;
    case Opcode::kMUL_WIDE:
        wide([&](uint32_t l) { return wideProduct(a[l], b[l], type); });
        break;
    case Opcode::kMAD:
        each([&](uint32_t l) { return a[l] * b[l] + c[l]; });
        break;
    case Opcode::kMAD_WIDE:
        wide([&](uint32_t l) { return wideProduct(a[l], b[l], type) + c[l]; });
        break;
    case Opcode::kFMA:
        real([&](float x, uint32_t l) { return std::fma(x, toFloat(b[l]), toFloat(c[l])); });
        break;
    case Opcode::kDIV:
        if (isReal)
        {
            real([&](float x, uint32_t l) { return x / toFloat(b[l]); });
        }
        else
        {
            divided(false);
        }
        break;
    case Opcode::kREM:
        divided(true);
        break;
    case Opcode::kRCP:
        real([](float x, uint32_t) { return 1.0F / x; });
        break;
    case Opcode::kNEG:
        each([&](uint32_t l) { return isReal ? a[l] ^ 0x80000000U : 0 - a[l]; });
        break;
    case Opcode::kABS:
        each(
            [&](uint32_t l)
            {
                int64_t const value = toSigned(a[l], type);
                return isReal ? a[l] & 0x7FFFFFFFU : static_cast<uint64_t>(value < 0 ? -value : value);
            });
        break;
    case Opcode::kNOT:
        each([&](uint32_t l) { return ~a[l]; });
        break;
    case Opcode::kAND:
        each([&](uint32_t l) { return a[l] & b[l]; });
        break;
    case Opcode::kOR:
        each([&](uint32_t l) { return a[l] | b[l]; });
        break;
    case Opcode::kXOR:
        each([&](uint32_t l) { return a[l] ^ b[l]; });
        break;
    case Opcode::kSHL:
        each([&](uint32_t l) { return (b[l] & UINT32_MAX) >= bits ? 0 : a[l] << (b[l] & 63); });
        break;
    case Opcode::kSHR:
        each(
            [&](uint32_t l)
            {
                uint64_t const count = std::min(b[l] & UINT32_MAX, bits);
                if (isSigned(type))
                {
                    return static_cast<uint64_t>(toSigned(a[l], type) >> std::min(count, bits - 1));
                }
                return count == bits ? 0 : (a[l] & kept) >> count;
            });
        break;
    case Opcode::kSHF_L:
    case Opcode::kSHF_R:
        each(
            [&](uint32_t l)
            {
                uint64_t const asked = c[l] & UINT32_MAX;
                uint64_t const count = in.variant == Variant::kCLAMP ? std::min<uint64_t>(asked, 32) : asked & 31;
                uint64_t const value = b[l] << 32 | (a[l] & UINT32_MAX);
                return in.opcode == Opcode::kSHF_R ? value >> count : count == 32 ? a[l] : value << count >> 32;
            });
        break;
    case Opcode::kBFI:
        each([&](uint32_t l) { return inserted(a[l], b[l], c[l] & 0xFF, s[3][l] & 0xFF, type); });
        break;
    case Opcode::kBFE:
        each([&](uint32_t l) { return bitField(a[l], b[l] & 0xFF, c[l] & 0xFF, type); });
        break;
    case Opcode::kBREV:
        each([&](uint32_t l) { return reversed(a[l], static_cast<int32_t>(bits)); });
        break;
    case Opcode::kCLZ:
        each([&](uint32_t l) { return a[l] == 0 ? bits : static_cast<uint64_t>(__builtin_clzll(a[l])) - (64 - bits); });
        break;
    case Opcode::kPOPC:
        each([&](uint32_t l) { return static_cast<uint64_t>(__builtin_popcountll(a[l])); });
        break;
    case Opcode::kBFIND:
        forLanes(mask,
            [&](uint32_t l)
            {
                bool const isBelow = isSigned(type) && toSigned(a[l], type) < 0;
                uint64_t const value = (isBelow ? ~a[l] : a[l]) & kept;
                uint64_t const highest = value == 0 ? 0 : 63 - static_cast<uint64_t>(__builtin_clzll(value));
                bool const isAmount = in.variant == Variant::kSHIFT_AMOUNT;
                target[l] = value == 0 ? UINT32_MAX : isAmount ? bits - 1 - highest : highest;
            });
        break;
    case Opcode::kPRMT:
        each([&](uint32_t l) { return permuted(a[l], b[l], c[l]); });
        break;
    case Opcode::kLOP3:
        each([&](uint32_t l) { return looked(a[l], b[l], c[l], in.table); });
        break;
    case Opcode::kSETP:
    {
        uint64_t* const second = in.targets.size() > 1 ? slot(warp, in.targets[1]) : nullptr;
        forLanes(mask,
            [&](uint32_t l)
            {
                uint64_t const holds = isReal ? compareFloats(in.compare, toFloat(a[l]), toFloat(b[l]))
                                              : compareNumbers(in.compare, type, a[l], b[l]);
                auto const combine = [&](uint64_t value)
                {
                    bool const isAlone = in.combine == Combine::kNONE;
                    return isAlone ? value : combined(in.combine, Type::kPRED, value, c[l] & 1, 0);
                };
                target[l] = combine(holds);
                if (second != nullptr)
                {
                    second[l] = combine(holds ^ 1);
                }
            });
        break;
    }
    case Opcode::kSELP:
    {
        uint32_t chosen = 0;
        forLanes(mask, [&](uint32_t l) { chosen |= static_cast<uint32_t>(c[l] & 1) << l; });
        source(warp, in.sources[0], 0, mask & chosen);
        source(warp, in.sources[1], 1, mask & ~chosen);
        each([&](uint32_t l) { return (c[l] & 1) != 0 ? a[l] : b[l]; });
        break;
    }
    case Opcode::kMOV:
        each([&](uint32_t l) { return a[l]; });
        break;
    case Opcode::kPACK:
    {
        uint64_t const part = bits / in.sources.size();
        uint64_t const low = ~uint64_t{0} >> (64 - part);
        each(
            [&](uint32_t l)
            {
                uint64_t value = 0;
                for (size_t i = 0; i < in.sources.size(); ++i)
                {
                    value |= (s[i][l] & low) << (part * i);
                }
                return value;
            });
        break;
    }
    case Opcode::kUNPACK:
    {
        uint64_t const part = bits / in.targets.size();
        uint64_t const low = ~uint64_t{0} >> (64 - part);
        Lanes values; // a target may be the source
        std::copy(a, a + kWarpSize, values);
        for (size_t i = 0; i < in.targets.size(); ++i)
        {
            uint64_t* const to = in.targets[i] < 0 ? mBuffers[5] : slot(warp, in.targets[i]);
            forLanes(mask, [&](uint32_t l) { to[l] = values[l] >> (part * i) & low; });
        }
        break;
    }
    case Opcode::kCVT:
        convert(in, mask, target, a);
        break;
    case Opcode::kCVTA:
        each([&](uint32_t l) { return a[l] + (in.space == Space::kSHARED ? kSharedWindow : 0); });
        break;
    case Opcode::kCVTA_TO:
        each([&](uint32_t l) { return a[l] - (in.space == Space::kSHARED ? kSharedWindow : 0); });
        break;
    case Opcode::kACTIVE_MASK:
        each([&](uint32_t) { return mWarps[warp].group; });
        break;
    default:
        throw std::logic_error("no arithmetic: " + in.text);
    }
}

} // namespace ptx
