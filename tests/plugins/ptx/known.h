//! \file known.h
//! The names of instructions and modifiers that are interpreted.

#ifndef PTX_KNOWN_H
#define PTX_KNOWN_H

#include "instruction.h"

#include <set>

namespace ptx
{
namespace
{

//! An instruction whose operands are a register and its sources.
struct Simple
{
    Opcode opcode;
    int32_t sources;
    std::set<std::string> modifiers;
    char const* types; //!< Of which one must be the first; null: any but halves.
};

std::map<std::string, Simple> const kSimple = {
    {"add", {Opcode::kADD, 2, {"rn"}, nullptr}},
    {"sub", {Opcode::kSUB, 2, {"rn"}, nullptr}},
    {"fma", {Opcode::kFMA, 3, {"rn"}, "f32"}},
    {"div", {Opcode::kDIV, 2, {"rn"}, nullptr}},
    {"rem", {Opcode::kREM, 2, {}, "u32 s32 u64 s64"}},
    {"rcp", {Opcode::kRCP, 1, {"rn"}, "f32"}},
    {"min", {Opcode::kMIN, 2, {}, nullptr}},
    {"max", {Opcode::kMAX, 2, {}, nullptr}},
    {"neg", {Opcode::kNEG, 1, {}, nullptr}},
    {"abs", {Opcode::kABS, 1, {}, nullptr}},
    {"not", {Opcode::kNOT, 1, {}, nullptr}},
    {"and", {Opcode::kAND, 2, {}, nullptr}},
    {"or", {Opcode::kOR, 2, {}, nullptr}},
    {"xor", {Opcode::kXOR, 2, {}, nullptr}},
    {"shl", {Opcode::kSHL, 2, {}, nullptr}},
    {"shr", {Opcode::kSHR, 2, {}, nullptr}},
    {"bfi", {Opcode::kBFI, 4, {}, nullptr}},
    {"bfe", {Opcode::kBFE, 3, {}, nullptr}},
    {"brev", {Opcode::kBREV, 1, {}, nullptr}},
    {"clz", {Opcode::kCLZ, 1, {}, nullptr}},
    {"popc", {Opcode::kPOPC, 1, {}, nullptr}},
    {"prmt", {Opcode::kPRMT, 3, {}, "b32"}},
    {"selp", {Opcode::kSELP, 3, {}, nullptr}},
    {"activemask", {Opcode::kACTIVE_MASK, 0, {}, "b32"}},
};

std::map<std::string, Compare> const kCompares = {{"eq", Compare::kEQ}, {"ne", Compare::kNE}, {"lt", Compare::kLT},
    {"le", Compare::kLE}, {"gt", Compare::kGT}, {"ge", Compare::kGE}, {"lo", Compare::kLT}, {"ls", Compare::kLE},
    {"hi", Compare::kGT}, {"hs", Compare::kGE}, {"equ", Compare::kEQU}, {"neu", Compare::kNEU}, {"ltu", Compare::kLTU},
    {"leu", Compare::kLEU}, {"gtu", Compare::kGTU}, {"geu", Compare::kGEU}, {"num", Compare::kNUM},
    {"nan", Compare::kNAN}};

std::map<std::string, Combine> const kCombines = {{"add", Combine::kADD}, {"min", Combine::kMIN},
    {"max", Combine::kMAX}, {"exch", Combine::kEXCH}, {"and", Combine::kAND}, {"or", Combine::kOR},
    {"xor", Combine::kXOR}, {"inc", Combine::kINC}, {"cas", Combine::kCAS}};

std::map<std::string, Space> const kSpaces = {
    {"global", Space::kGLOBAL}, {"shared", Space::kSHARED}, {"param", Space::kPARAM}};

std::map<std::string, Variant> const kRoundings = {{"rni", Variant::kNEAREST}, {"rzi", Variant::kTO_ZERO},
    {"rmi", Variant::kDOWN}, {"rpi", Variant::kUP}, {"rn", Variant::kNONE}};

std::map<std::string, Variant> const kShuffles = {{"up", Variant::kSHUFFLE_UP}, {"down", Variant::kSHUFFLE_DOWN},
    {"bfly", Variant::kSHUFFLE_XOR}, {"idx", Variant::kSHUFFLE_INDEX}};

std::map<std::string, Variant> const kVotes = {
    {"ballot", Variant::kBALLOT}, {"any", Variant::kANY}, {"all", Variant::kALL}, {"uni", Variant::kUNI}};

} // namespace
} // namespace ptx

#endif // PTX_KNOWN_H
