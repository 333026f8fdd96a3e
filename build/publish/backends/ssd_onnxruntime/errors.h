//! \file errors.h
//! How a fault becomes an error of Triton's: no exception leaves the library.

#ifndef SSD_ERRORS_H
#define SSD_ERRORS_H

#include "triton.h"

#include <exception>
#include <stdexcept>
#include <string>

//! A finding worded for the person who sent a request or loads a model.
class Refused : public std::runtime_error
{
public:
    explicit Refused(std::string const& what, TRITONSERVER_Error_Code code = TRITONSERVER_ERROR_INVALID_ARG)
        : std::runtime_error(what)
        , mCode(code)
    {
    }

    TRITONSERVER_Error_Code code() const noexcept
    {
        return mCode;
    }

private:
    TRITONSERVER_Error_Code mCode;
};

//! Throws what Triton says went wrong.
inline void check(TRITONSERVER_Error* error)
{
    if (error != nullptr)
    {
        std::string const message = TRITONSERVER_ErrorMessage(error);
        TRITONSERVER_ErrorDelete(error);
        throw Refused(message, TRITONSERVER_ERROR_INTERNAL);
    }
}

//! Logs what Triton says went wrong, where nobody is left to be told.
inline void logged(TRITONSERVER_Error* error) noexcept
{
    if (error != nullptr)
    {
        TRITONSERVER_LogMessage(TRITONSERVER_LOG_ERROR, __FILE__, __LINE__, TRITONSERVER_ErrorMessage(error));
        TRITONSERVER_ErrorDelete(error);
    }
}

//! The exception that is on its way, for Triton.
inline TRITONSERVER_Error* caught() noexcept
{
    try
    {
        throw;
    }
    catch (Refused const& error)
    {
        return TRITONSERVER_ErrorNew(error.code(), error.what());
    }
    catch (std::exception const& error)
    {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, error.what());
    }
    catch (...)
    {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, "unknown exception");
    }
}

//! Runs an entry point's body.
template <typename Body>
TRITONSERVER_Error* guarded(Body const& body) noexcept
{
    try
    {
        body();
        return nullptr;
    }
    catch (...)
    {
        return caught();
    }
}

#endif // SSD_ERRORS_H
