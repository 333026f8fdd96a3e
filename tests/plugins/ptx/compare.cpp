//! \file compare.cpp
//! Comparisons, minima, maxima and what atomics do.

#include "machine.h"

#include <cmath>

namespace ptx
{

bool compareFloats(Compare compare, float a, float b)
{
    bool const isUnordered = a != a || b != b;
    switch (compare)
    {
    case Compare::kEQ:
        return a == b;
    case Compare::kNE:
        return !isUnordered && a != b;
    case Compare::kLT:
        return a < b;
    case Compare::kLE:
        return a <= b;
    case Compare::kGT:
        return a > b;
    case Compare::kGE:
        return a >= b;
    case Compare::kEQU:
        return isUnordered || a == b;
    case Compare::kNEU:
        return isUnordered || a != b;
    case Compare::kLTU:
        return isUnordered || a < b;
    case Compare::kLEU:
        return isUnordered || a <= b;
    case Compare::kGTU:
        return isUnordered || a > b;
    case Compare::kGEU:
        return isUnordered || a >= b;
    case Compare::kNUM:
        return !isUnordered;
    case Compare::kNAN:
        return isUnordered;
    }
    throw std::logic_error("comparison");
}

bool compareNumbers(Compare compare, Type type, uint64_t a, uint64_t b)
{
    auto const decide = [compare](auto x, auto y)
    {
        switch (compare)
        {
        case Compare::kEQ:
            return x == y;
        case Compare::kNE:
            return x != y;
        case Compare::kLT:
            return x < y;
        case Compare::kLE:
            return x <= y;
        case Compare::kGT:
            return x > y;
        case Compare::kGE:
            return x >= y;
        default:
            throw std::logic_error("comparison of whole numbers");
        }
    };
    return isSigned(type) ? decide(toSigned(a, type), toSigned(b, type)) : decide(a & maskOf(type), b & maskOf(type));
}

//! As IEEE 754-2019's minimumNumber: a NaN counts as nothing, and -0 is below +0.
float smallerOf(float a, float b)
{
    if (a != a || b != b)
    {
        return a != a ? b : a;
    }
    return a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b);
}

float largerOf(float a, float b)
{
    if (a != a || b != b)
    {
        return a != a ? b : a;
    }
    return a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b);
}

uint64_t combined(Combine combine, Type type, uint64_t old, uint64_t value, uint64_t other)
{
    uint64_t const mask = maskOf(type);
    switch (combine)
    {
    case Combine::kADD:
        return old + value;
    case Combine::kMIN:
        return compareNumbers(Compare::kLT, type, old, value) ? old : value;
    case Combine::kMAX:
        return compareNumbers(Compare::kLT, type, old, value) ? value : old;
    case Combine::kEXCH:
        return value;
    case Combine::kAND:
        return old & value;
    case Combine::kOR:
        return old | value;
    case Combine::kXOR:
        return old ^ value;
    case Combine::kINC:
        return (old & mask) >= (value & mask) ? 0 : old + 1;
    case Combine::kCAS:
        return (old & mask) == (value & mask) ? other : old;
    case Combine::kNONE:
        break;
    }
    throw std::logic_error("atomic");
}

} // namespace ptx
