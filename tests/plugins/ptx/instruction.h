//! \file instruction.h
//! PTX as the interpreter holds it: kernels, their instructions and operands.

#ifndef PTX_INSTRUCTION_H
#define PTX_INSTRUCTION_H

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx
{

constexpr uint32_t kWarpSize = 32;

enum class Type : uint8_t
{
    kPRED,
    kB8,
    kU8,
    kS8,
    kB16,
    kU16,
    kS16,
    kF16,
    kB32,
    kU32,
    kS32,
    kF32,
    kB64,
    kU64,
    kS64,
    kNONE,
};

constexpr char const* kTypeNames[] = {
    "pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "b32", "u32", "s32", "f32", "b64", "u64", "s64"};

inline int32_t bytesOf(Type type)
{
    constexpr int32_t kBytes[] = {4, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 4};
    return kBytes[static_cast<int32_t>(type)];
}

inline bool isSigned(Type type)
{
    return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

inline bool isFloat(Type type)
{
    return type == Type::kF16 || type == Type::kF32;
}

//! The bits of a register that a type has.
inline uint64_t maskOf(Type type)
{
    return type == Type::kPRED ? 1 : ~uint64_t{0} >> (64 - 8 * bytesOf(type));
}

enum class Opcode : uint8_t
{
    kADD,
    kSUB,
    kMUL,
    kMUL_WIDE,
    kMUL_HI,
    kMAD,
    kMAD_WIDE,
    kFMA,
    kDIV,
    kREM,
    kRCP,
    kMIN,
    kMAX,
    kMIN_PAIR,
    kMAX_PAIR,
    kNEG,
    kABS,
    kNOT,
    kAND,
    kOR,
    kXOR,
    kSHL,
    kSHR,
    kSHF_L,
    kSHF_R,
    kBFI,
    kBFE,
    kBREV,
    kCLZ,
    kPOPC,
    kBFIND,
    kPRMT,
    kLOP3,
    kSETP,
    kSELP,
    kMOV,
    kPACK,
    kUNPACK,
    kCVT,
    kCVTA,
    kCVTA_TO,
    kLD,
    kST,
    kATOM,
    kRED,
    kBRA,
    kBAR,
    kSHFL,
    kVOTE,
    kREDUX,
    kWARP_SYNC,
    kACTIVE_MASK,
    kRET,
};

enum class Compare : uint8_t
{
    kEQ,
    kNE,
    kLT,
    kLE,
    kGT,
    kGE,
    kEQU, //!< From here on: also true for NaN.
    kNEU,
    kLTU,
    kLEU,
    kGTU,
    kGEU,
    kNUM,
    kNAN,
};

enum class Space : uint8_t
{
    kGENERIC,
    kGLOBAL,
    kSHARED,
    kPARAM,
};

//! What an atomic, a reduction or the second part of a setp does.
enum class Combine : uint8_t
{
    kNONE,
    kADD,
    kMIN,
    kMAX,
    kEXCH,
    kAND,
    kOR,
    kXOR,
    kINC,
    kCAS,
};

//! How a conversion rounds, a shuffle moves, or a vote counts.
enum class Variant : uint8_t
{
    kNONE,
    kNEAREST,
    kTO_ZERO,
    kDOWN,
    kUP,
    kCLAMP,
    kSHIFT_AMOUNT,
    kSHUFFLE_UP,
    kSHUFFLE_DOWN,
    kSHUFFLE_XOR,
    kSHUFFLE_INDEX,
    kBALLOT,
    kANY,
    kALL,
    kUNI,
};

struct Operand
{
    bool isImmediate{true};
    bool isNegated{false};
    int32_t slot{-1}; //!< Of a register.
    uint64_t value{0}; //!< Of an immediate.
};

struct Place
{
    int32_t file{0};
    int32_t line{0};
    int32_t callerLine{0}; //!< Where the function of that line was inlined, or 0.
};

struct Instruction
{
    Opcode opcode{Opcode::kRET};
    Type type{Type::kNONE};
    Type sourceType{Type::kNONE}; //!< The second of its types.
    Compare compare{Compare::kEQ};
    Space space{Space::kGENERIC};
    Combine combine{Combine::kNONE};
    Variant variant{Variant::kNONE};
    int32_t table{0}; //!< Of lop3.
    int32_t vector{1}; //!< Elements that a load or store moves.
    int32_t predicate{-1};
    bool isPredicateNegated{false};
    bool isUniform{false};
    std::vector<int32_t> targets; //!< Registers; -1: thrown away.
    std::vector<Operand> sources;
    Operand base; //!< Of an address.
    int64_t offset{0};
    int32_t jump{-1};
    std::string label; //!< Of the jump.
    std::string text;
    Place place;

    bool isMemory() const
    {
        return opcode == Opcode::kLD || opcode == Opcode::kST || opcode == Opcode::kATOM || opcode == Opcode::kRED;
    }

    bool isAtomic() const
    {
        return opcode == Opcode::kATOM || opcode == Opcode::kRED;
    }

    //! Whether the lanes of a warp meet here.
    bool isWarpOperation() const
    {
        return opcode == Opcode::kSHFL || opcode == Opcode::kVOTE || opcode == Opcode::kREDUX
            || opcode == Opcode::kWARP_SYNC;
    }
};

struct Kernel
{
    std::string name;
    std::vector<Instruction> code;
    std::vector<bool> isTarget; //!< Of a jump, by instruction.
    std::map<std::string, int32_t> slots; //!< Registers by name.
    std::vector<Type> slotTypes;
    std::map<std::string, int32_t> labels;
    std::map<std::string, int32_t> parameters; //!< Offsets.
    int32_t parameterBytes{0};
    uint32_t mostThreads{0}; //!< 0: any number.
};

struct Module
{
    std::vector<Kernel> kernels;
    std::map<int32_t, std::string> files;
};

//! Registers that the machine fills.
constexpr char const* kSpecialRegisters[] = {
    "%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid", "%lanemask_lt", "%tid.y", "%tid.z"};

//! The dynamic shared memory's address within its window.
constexpr uint64_t kSharedBase = 0x400;
//! Where the window of shared memory is among generic addresses.
constexpr uint64_t kSharedWindow = 0xF00000000000;
constexpr uint64_t kSharedWindowBytes = 1 << 20;

//! What the interpreter does not know, in the text of a module.
struct ParseError : std::runtime_error
{
    using std::runtime_error::runtime_error;
};

//! \throw ParseError for every instruction, modifier or directive that is not interpreted exactly.
Module parse(std::string const& text);

inline float toFloat(uint64_t bits)
{
    auto const low = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &low, sizeof(value));
    return value;
}

//! A GPU's arithmetic gives one NaN only.
inline uint64_t fromFloat(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return value != value ? 0x7FFFFFFF : bits;
}

//! A register's value as a signed number.
inline int64_t toSigned(uint64_t value, Type type)
{
    int32_t const unused = 64 - 8 * bytesOf(type);
    return static_cast<int64_t>(value << unused) >> unused;
}

} // namespace ptx

#endif // PTX_INSTRUCTION_H
