//! \file statement.h
//! One statement of a kernel, as text and as an instruction.

#ifndef PTX_STATEMENT_H
#define PTX_STATEMENT_H

#include "instruction.h"

#include <set>

namespace ptx
{

std::string strip(std::string const& text);

//! The parts between commas, those within brackets and braces left alone.
std::vector<std::string> splitList(std::string const& text);

//! \return kNONE for what is no type.
Type typeOf(std::string const& name);

//! \param sharedSymbols names of the dynamic shared memory.
//! \throw ParseError what is not known is refused.
Instruction parseStatement(
    std::string const& text, Kernel const& kernel, std::set<std::string> const& sharedSymbols, Place const& place);

} // namespace ptx

#endif // PTX_STATEMENT_H
