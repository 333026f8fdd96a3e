//! \file statement.cpp
//! The instructions that are known, with the modifiers that are.

#include "statement.h"
#include "known.h"

#include <cctype>
#include <cstdlib>

namespace ptx
{

namespace
{

class Statement
{
public:
    Statement(std::string const& text, Kernel const& kernel, std::set<std::string> const& sharedSymbols)
        : mKernel{kernel}
        , mSharedSymbols{sharedSymbols}
    {
        mResult.text = text;
    }

    Instruction parse()
    {
        std::string rest = mResult.text;
        if (rest[0] == '@')
        {
            size_t const blank = rest.find_first_of(" \t");
            mResult.isPredicateNegated = rest[1] == '!';
            mResult.predicate = slotOf(
                rest.substr(mResult.isPredicateNegated ? 2 : 1, blank - 1 - (mResult.isPredicateNegated ? 1 : 0)));
            rest = strip(rest.substr(blank));
        }
        size_t const blank = rest.find_first_of(" \t");
        std::string const name = takeName(rest.substr(0, blank));
        mOperands = blank == std::string::npos ? std::vector<std::string>{} : splitList(rest.substr(blank));
        auto const simple = kSimple.find(name);
        bool const isPair = mModifiers.count("f16x2") != 0;
        if (simple != kSimple.end() && !isPair)
        {
            parseSimple(simple->second);
        }
        else if (!parseArithmetic(name) && !parseMemory(name) && !parseControl(name))
        {
            fail("instruction not known");
        }
        return std::move(mResult);
    }

private:
    [[noreturn]] void fail(std::string const& what) const
    {
        throw ParseError(what + ": " + mResult.text);
    }

    //! Takes the name apart into types and modifiers.
    std::string takeName(std::string const& dotted)
    {
        std::string name;
        size_t begin = 0;
        while (begin < dotted.size())
        {
            size_t const end = std::min(dotted.find('.', begin), dotted.size());
            std::string const part = dotted.substr(begin, end - begin);
            begin = end + 1;
            Type const type = typeOf(part);
            if (name.empty())
            {
                name = part;
            }
            else if (type == Type::kNONE)
            {
                mModifiers.insert(part);
            }
            else
            {
                (mResult.type == Type::kNONE ? mResult.type : mResult.sourceType) = type;
            }
        }
        return name;
    }

    void allow(std::set<std::string> const& known) const
    {
        for (std::string const& modifier : mModifiers)
        {
            if (known.count(modifier) == 0)
            {
                fail("modifier ." + modifier + " is not known");
            }
        }
    }

    //! The one of the modifiers that a table has; the others are `others`.
    template <typename Value>
    Value choose(std::map<std::string, Value> const& table, std::set<std::string> others) const
    {
        Value const* chosen = nullptr;
        for (auto const& entry : table)
        {
            if (mModifiers.count(entry.first) != 0)
            {
                chosen = chosen == nullptr ? &entry.second : nullptr;
            }
            others.insert(entry.first);
        }
        allow(others);
        if (chosen == nullptr)
        {
            fail("needs one modifier");
        }
        return *chosen;
    }

    bool has(char const* modifier) const
    {
        return mModifiers.count(modifier) != 0;
    }

    int32_t slotOf(std::string const& name) const
    {
        auto const found = mKernel.slots.find(name);
        if (found == mKernel.slots.end())
        {
            fail("unknown register " + name);
        }
        return found->second;
    }

    Operand operandOf(std::string text) const
    {
        Operand operand;
        if (!text.empty() && text[0] == '!')
        {
            operand.isNegated = true;
            text = strip(text.substr(1));
        }
        if (text.empty())
        {
            fail("an operand is missing");
        }
        if (text[0] == '%')
        {
            operand.isImmediate = false;
            operand.slot = slotOf(text);
        }
        else if (text.size() == 10 && text[0] == '0' && (text[1] == 'f' || text[1] == 'F'))
        {
            operand.value = std::strtoull(text.c_str() + 2, nullptr, 16);
        }
        else if (std::isdigit(static_cast<unsigned char>(text[0])) != 0)
        {
            operand.value = std::strtoull(text.c_str(), nullptr, 0);
        }
        else if (text[0] == '-')
        {
            operand.value = static_cast<uint64_t>(std::strtoll(text.c_str(), nullptr, 0));
        }
        else if (mSharedSymbols.count(text) != 0)
        {
            operand.value = kSharedBase;
        }
        else if (mKernel.parameters.count(text) != 0)
        {
            operand.value = static_cast<uint64_t>(mKernel.parameters.at(text));
        }
        else
        {
            fail("unknown operand " + text);
        }
        return operand;
    }

    //! One register or, in braces, several.
    static std::vector<std::string> listOf(std::string const& text)
    {
        return text[0] == '{' ? splitList(text.substr(1, text.size() - 2)) : std::vector<std::string>{text};
    }

    void addTargets(std::string const& text)
    {
        for (std::string const& name : listOf(text))
        {
            mResult.targets.push_back(name == "_" ? -1 : slotOf(name));
        }
    }

    void addSources(size_t begin)
    {
        for (size_t i = begin; i < mOperands.size(); ++i)
        {
            mResult.sources.push_back(operandOf(mOperands[i]));
        }
    }

    //! "[base + offset]"
    void setAddress(std::string const& text)
    {
        if (text[0] != '[')
        {
            fail("needs an address");
        }
        std::string const inner = text.substr(1, text.size() - 2);
        size_t const plus = inner.find('+');
        mResult.base = operandOf(strip(inner.substr(0, plus)));
        mResult.offset = plus == std::string::npos ? 0 : std::strtoll(inner.c_str() + plus + 1, nullptr, 0);
    }

    void expectOperands(size_t count) const
    {
        if (mOperands.size() != count)
        {
            fail("needs " + std::to_string(count) + " operands");
        }
    }

    void setSimple(Opcode opcode, size_t sources)
    {
        expectOperands(sources + 1);
        mResult.opcode = opcode;
        addTargets(mOperands[0]);
        addSources(1);
    }

    void parseSimple(Simple const& simple)
    {
        allow(simple.modifiers);
        bool const isExact = !isFloat(mResult.type) || has("rn")
            || (simple.opcode != Opcode::kDIV && simple.opcode != Opcode::kRCP && simple.opcode != Opcode::kFMA);
        if (!isExact || mResult.type == Type::kF16 || mResult.type == Type::kNONE)
        {
            fail("only exact arithmetic of known types is interpreted");
        }
        std::string const type = kTypeNames[static_cast<int32_t>(mResult.type)];
        if (simple.types != nullptr
            && (std::string{" "} + simple.types + " ").find(" " + type + " ") == std::string::npos)
        {
            fail("type ." + type + " is not known");
        }
        setSimple(simple.opcode, static_cast<size_t>(simple.sources));
    }

    bool parseArithmetic(std::string const& name)
    {
        if (name == "min" || name == "max")
        {
            allow({"f16x2"});
            mResult.type = Type::kB32;
            setSimple(name == "min" ? Opcode::kMIN_PAIR : Opcode::kMAX_PAIR, 2);
        }
        else if (name == "mul")
        {
            allow({"rn", "lo", "hi", "wide"});
            setSimple(has("wide") ? Opcode::kMUL_WIDE : has("hi") ? Opcode::kMUL_HI : Opcode::kMUL, 2);
        }
        else if (name == "mad")
        {
            allow({"lo", "wide"});
            setSimple(has("wide") ? Opcode::kMAD_WIDE : Opcode::kMAD, 3);
            if (isFloat(mResult.type))
            {
                fail("needs whole numbers");
            }
        }
        else if (name == "shf")
        {
            allow({"l", "r", "wrap", "clamp"});
            setSimple(has("l") ? Opcode::kSHF_L : Opcode::kSHF_R, 3);
            mResult.variant = has("clamp") ? Variant::kCLAMP : Variant::kNONE;
        }
        else if (name == "bfind")
        {
            allow({"shiftamt"});
            setSimple(Opcode::kBFIND, 1);
            mResult.variant = has("shiftamt") ? Variant::kSHIFT_AMOUNT : Variant::kNONE;
        }
        else if (name == "lop3")
        {
            allow({});
            expectOperands(5);
            mResult.table = static_cast<int32_t>(std::strtol(mOperands.back().c_str(), nullptr, 0));
            mOperands.pop_back();
            setSimple(Opcode::kLOP3, 3);
        }
        else if (name == "setp")
        {
            parseCompare();
        }
        else if (name == "mov")
        {
            allow({});
            expectOperands(2);
            bool const isPack = mOperands[1][0] == '{';
            mResult.opcode = isPack ? Opcode::kPACK : mOperands[0][0] == '{' ? Opcode::kUNPACK : Opcode::kMOV;
            addTargets(mOperands[0]);
            for (std::string const& source : listOf(mOperands[1]))
            {
                mResult.sources.push_back(operandOf(source));
            }
        }
        else if (name == "cvt")
        {
            setSimple(Opcode::kCVT, 1);
            mResult.variant = mModifiers.empty() ? Variant::kNONE : choose(kRoundings, {});
        }
        else if (name == "cvta")
        {
            allow({"to", "global", "shared"});
            setSimple(has("to") ? Opcode::kCVTA_TO : Opcode::kCVTA, 1);
            mResult.space = has("shared") ? Space::kSHARED : Space::kGLOBAL;
        }
        else
        {
            return false;
        }
        return true;
    }

    void parseCompare()
    {
        mResult.opcode = Opcode::kSETP;
        mResult.compare = choose(kCompares, {"and", "or", "xor"});
        mResult.combine = has("and") ? Combine::kAND
            : has("or")              ? Combine::kOR
            : has("xor")             ? Combine::kXOR
                                     : Combine::kNONE;
        expectOperands(mResult.combine == Combine::kNONE ? 3 : 4);
        setBoth(mOperands[0]);
        addSources(1);
    }

    //! "%p1|%p2": a result and a second one.
    void setBoth(std::string const& text)
    {
        size_t const bar = text.find('|');
        addTargets(strip(text.substr(0, bar)));
        if (bar != std::string::npos)
        {
            addTargets(strip(text.substr(bar + 1)));
        }
    }

    //! Space and vector of a load, store or atomic.
    void setSpace()
    {
        for (auto const& space : kSpaces)
        {
            mResult.space = has(space.first.c_str()) ? space.second : mResult.space;
        }
        mResult.vector = has("v4") ? 4 : has("v2") ? 2 : 1;
    }

    bool parseMemory(std::string const& name)
    {
        if (name == "ld" || name == "st")
        {
            bool const isLoad = name == "ld";
            allow({"global", "shared", "param", "v2", "v4", "nc"});
            setSpace();
            expectOperands(2);
            mResult.opcode = isLoad ? Opcode::kLD : Opcode::kST;
            setAddress(mOperands[isLoad ? 1 : 0]);
            std::vector<std::string> const values = listOf(mOperands[isLoad ? 0 : 1]);
            if (static_cast<int32_t>(values.size()) != mResult.vector)
            {
                fail("the vector has another length");
            }
            for (std::string const& value : values)
            {
                if (isLoad)
                {
                    addTargets(value);
                }
                else
                {
                    mResult.sources.push_back(operandOf(value));
                }
            }
        }
        else if (name == "atom" || name == "red")
        {
            mResult.opcode = name == "atom" ? Opcode::kATOM : Opcode::kRED;
            mResult.combine = choose(kCombines, {"global", "shared", "relaxed", "gpu", "cta"});
            setSpace();
            size_t const address = name == "atom" ? 1 : 0;
            if (name == "atom")
            {
                addTargets(mOperands.at(0));
            }
            setAddress(mOperands.at(address));
            addSources(address + 1);
            if (isFloat(mResult.type))
            {
                fail("needs whole numbers");
            }
        }
        else
        {
            return false;
        }
        return true;
    }

    bool parseControl(std::string const& name)
    {
        if (name == "bra")
        {
            allow({"uni"});
            mResult.opcode = Opcode::kBRA;
            mResult.isUniform = has("uni");
            mResult.label = mOperands.at(0);
        }
        else if (name == "ret" || name == "exit")
        {
            mResult.opcode = Opcode::kRET;
        }
        else if (name == "bar" && has("warp"))
        {
            allow({"warp", "sync"});
            mResult.opcode = Opcode::kWARP_SYNC;
            addSources(0);
        }
        else if (name == "bar" || name == "barrier")
        {
            allow({"sync"});
            mResult.opcode = Opcode::kBAR;
            if (mOperands != std::vector<std::string>{"0"})
            {
                fail("only barrier 0 of all threads is known");
            }
        }
        else if (name == "shfl" && has("sync"))
        {
            mResult.opcode = Opcode::kSHFL;
            mResult.variant = choose(kShuffles, {"sync"});
            expectOperands(5);
            setBoth(mOperands[0]);
            addSources(1);
        }
        else if (name == "vote" && has("sync"))
        {
            mResult.variant = choose(kVotes, {"sync"});
            setSimple(Opcode::kVOTE, 2);
        }
        else if (name == "redux" && has("sync"))
        {
            mResult.combine = choose(kCombines, {"sync"});
            setSimple(Opcode::kREDUX, 2);
        }
        else
        {
            return false;
        }
        return true;
    }

    Kernel const& mKernel;
    std::set<std::string> const& mSharedSymbols;
    std::set<std::string> mModifiers;
    std::vector<std::string> mOperands;
    Instruction mResult;
};

} // namespace

Instruction parseStatement(
    std::string const& text, Kernel const& kernel, std::set<std::string> const& sharedSymbols, Place const& place)
{
    Instruction instruction = Statement{text, kernel, sharedSymbols}.parse();
    instruction.place = place;
    return instruction;
}

} // namespace ptx
