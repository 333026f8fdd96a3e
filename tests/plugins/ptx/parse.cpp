//! \file parse.cpp
//! The text of a PTX module: directives, labels, registers, statements.

#include "statement.h"

#include <algorithm>
#include <cstdio>
#include <sstream>

namespace ptx
{

std::string strip(std::string const& text)
{
    constexpr char kBlank[] = " \t\r\n";
    size_t const begin = text.find_first_not_of(kBlank);
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kBlank) - begin + 1);
}

std::vector<std::string> splitList(std::string const& text)
{
    std::vector<std::string> parts(1);
    int32_t depth = 0;
    for (char const c : text)
    {
        depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
        if (c == ',' && depth == 0)
        {
            parts.emplace_back();
        }
        else
        {
            parts.back() += c;
        }
    }
    for (std::string& part : parts)
    {
        part = strip(part);
    }
    if (parts.back().empty())
    {
        parts.pop_back();
    }
    return parts;
}

Type typeOf(std::string const& name)
{
    int32_t number = 0;
    for (char const* const known : kTypeNames)
    {
        if (name == known)
        {
            return static_cast<Type>(number);
        }
        ++number;
    }
    return Type::kNONE;
}

namespace
{

//! Goes through a module line by line.
class Parser
{
public:
    Module parse(std::string const& text)
    {
        std::istringstream lines{text};
        std::string line;
        while (std::getline(lines, line))
        {
            line = strip(line.substr(0, line.find("//")));
            if (!line.empty())
            {
                take(line);
            }
        }
        return std::move(mModule);
    }

private:
    void take(std::string const& line)
    {
        mIsInSection = mIsInSection || line.rfind(".section", 0) == 0;
        if (mIsInSection)
        {
            mIsInSection = line != "}";
        }
        else if (line.rfind(".file", 0) == 0)
        {
            int32_t number;
            char name[4096];
            if (std::sscanf(line.c_str(), ".file %d \"%4095[^\"]\"", &number, name) == 2)
            {
                mModule.files[number] = name;
            }
        }
        else if (line.rfind(".loc", 0) == 0)
        {
            int32_t column;
            mPlace.callerLine = 0;
            std::sscanf(line.c_str(), ".loc %d %d %d", &mPlace.file, &mPlace.line, &column);
            size_t const inlined = line.find("inlined_at");
            if (inlined != std::string::npos)
            {
                int32_t callerFile;
                std::sscanf(line.c_str() + inlined, "inlined_at %d %d", &callerFile, &mPlace.callerLine);
            }
        }
        else if (mKernel == nullptr)
        {
            takeOutside(line);
        }
        else
        {
            takeInside(line);
        }
    }

    //! What stands around the kernels.
    void takeOutside(std::string const& line)
    {
        if (!mHeader.empty() || line.find(".entry") != std::string::npos)
        {
            mHeader += " " + line;
            if (line.find('{') != std::string::npos)
            {
                beginKernel();
            }
            return;
        }
        bool const isExtern = line.find(".extern") != std::string::npos;
        if (isExtern && line.find(".shared") != std::string::npos)
        {
            size_t const bracket = line.find('[');
            size_t const blank = line.find_last_of(" \t", bracket);
            mSharedSymbols.insert(strip(line.substr(blank, bracket - blank)));
            return;
        }
        bool const isVariable = line.rfind(".global", 0) == 0 && line.back() == ';'; // whoever uses it is refused
        for (char const* const directive : {".shared", ".const", ".global", ".func"})
        {
            if (!isVariable && line.find(directive) != std::string::npos)
            {
                throw ParseError("not supported: " + line);
            }
        }
    }

    void beginKernel()
    {
        mModule.kernels.emplace_back();
        mKernel = &mModule.kernels.back();
        size_t const entry = mHeader.find(".entry") + 6;
        size_t const begin = mHeader.find('(', entry);
        size_t const end = mHeader.find(')', begin);
        mKernel->name = strip(mHeader.substr(entry, begin - entry));
        int32_t offset = 0;
        for (std::string const& parameter : splitList(mHeader.substr(begin + 1, end - begin - 1)))
        {
            int32_t alignment = 8;
            int32_t bytes = 8;
            std::istringstream words{parameter};
            std::string word;
            std::string name;
            while (words >> word)
            {
                if (word == ".align")
                {
                    words >> alignment;
                }
                name = word;
            }
            size_t const bracket = name.find('[');
            if (bracket != std::string::npos)
            {
                bytes = std::stoi(name.substr(bracket + 1));
                name = name.substr(0, bracket);
            }
            offset = (offset + alignment - 1) / alignment * alignment;
            mKernel->parameters[name] = offset;
            offset += bytes;
        }
        mKernel->parameterBytes = offset;
        size_t const threads = mHeader.find(".maxntid");
        if (threads != std::string::npos)
        {
            mKernel->mostThreads = static_cast<uint32_t>(std::stoul(mHeader.substr(threads + 8)));
        }
        for (char const* const name : kSpecialRegisters)
        {
            declare(name, Type::kU32);
        }
        mHeader.clear();
        mDepth = 1;
    }

    void endKernel()
    {
        mKernel->isTarget.assign(mKernel->code.size() + 1, false);
        for (Instruction& instruction : mKernel->code)
        {
            if (instruction.opcode == Opcode::kBRA)
            {
                auto const label = mKernel->labels.find(instruction.label);
                if (label == mKernel->labels.end())
                {
                    throw ParseError("unknown label " + instruction.label);
                }
                instruction.jump = label->second;
                mKernel->isTarget[static_cast<size_t>(instruction.jump)] = true;
            }
        }
        mKernel = nullptr;
    }

    //! Part of a kernel's body: statements end with a semicolon, labels with a colon, and braces nest.
    void takeInside(std::string const& line)
    {
        size_t i = 0;
        while (i < line.size() && mKernel != nullptr)
        {
            char const c = line[i];
            if (mStatement.empty())
            {
                size_t const colon = line.find(':', i);
                if (c == '{' || c == '}' || c == ' ' || c == '\t')
                {
                    mDepth += c == '{' ? 1 : c == '}' ? -1 : 0;
                    ++i;
                    if (mDepth == 0)
                    {
                        endKernel();
                    }
                    continue;
                }
                if (colon != std::string::npos && colon < line.find(';', i) && c != '@')
                {
                    mKernel->labels[strip(line.substr(i, colon - i))] = static_cast<int32_t>(mKernel->code.size());
                    i = colon + 1;
                    continue;
                }
            }
            ++i;
            if (c != ';')
            {
                mStatement += c;
                continue;
            }
            statement(strip(mStatement));
            mStatement.clear();
        }
        if (!mStatement.empty())
        {
            mStatement += ' ';
        }
    }

    void statement(std::string const& text)
    {
        if (text.rfind(".reg", 0) == 0)
        {
            std::istringstream words{text};
            std::string directive;
            std::string type;
            std::string names;
            words >> directive >> type;
            std::getline(words, names);
            for (std::string const& name : splitList(names))
            {
                declareAll(name, typeOf(type.substr(1)));
            }
        }
        else if (text[0] != '.')
        {
            mKernel->code.push_back(parseStatement(text, *mKernel, mSharedSymbols, mPlace));
        }
        else if (text.rfind(".pragma", 0) != 0)
        {
            throw ParseError("directive not known: " + text); // local memory among them
        }
    }

    //! "%r<5>" stands for %r0 to %r4.
    void declareAll(std::string const& name, Type type)
    {
        size_t const bracket = name.find('<');
        if (bracket == std::string::npos)
        {
            declare(name, type);
            return;
        }
        int32_t const count = std::stoi(name.substr(bracket + 1));
        for (int32_t i = 0; i < count; ++i)
        {
            declare(name.substr(0, bracket) + std::to_string(i), type);
        }
    }

    void declare(std::string const& name, Type type)
    {
        if (mKernel->slots.emplace(name, static_cast<int32_t>(mKernel->slotTypes.size())).second)
        {
            mKernel->slotTypes.push_back(type);
        }
    }

    Module mModule;
    Kernel* mKernel{nullptr};
    std::set<std::string> mSharedSymbols;
    std::string mHeader;
    std::string mStatement;
    Place mPlace;
    int32_t mDepth{0};
    bool mIsInSection{false};
};

} // namespace

Module parse(std::string const& text)
{
    return Parser{}.parse(text);
}

} // namespace ptx
