//! \file logging.h
//! The border to TensorRT: no exception crosses it, and every reason reaches the logger of whoever called.

#ifndef SSD_NMS_TENSORRT_LOGGING_H
#define SSD_NMS_TENSORRT_LOGGING_H

#include <NvInfer.h>

#include <atomic>
#include <cstdio>
#include <exception>
#include <string>

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

//! What setLoggerFinder() was given last; null: nothing.
std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};

//! \return the finder's logger, which is that of the calling engine or context; else TensorRT's global one; else null.
ILogger* currentLogger() noexcept
{
    try
    {
        ILoggerFinder* const finder = gLoggerFinder.load();
        ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
        return logger == nullptr ? getLogger() : logger;
    }
    catch (...) // findLogger() may throw
    {
        return getLogger();
    }
}

void logError(char const* message) noexcept
{
    std::string text;
    try
    {
        text = std::string{"[SSDNMS] "} + message;
    }
    catch (std::exception const&) // no memory for the prefix
    {
    }
    char const* const line = text.empty() ? message : text.c_str();
    if (ILogger* const logger = currentLogger())
    {
        logger->log(ILogger::Severity::kERROR, line);
    }
    else
    {
        std::fprintf(stderr, "%s\n", line);
    }
}

//! Runs a function that may throw, at the border to TensorRT, which must see no exception.
//! \return its result, or `failure` with the reason logged.
template <typename Result, typename Function>
Result guarded(Result failure, Function&& function) noexcept
{
    try
    {
        return function();
    }
    catch (std::exception const& error)
    {
        logError(error.what());
    }
    catch (...)
    {
        logError("unknown error");
    }
    return failure;
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_TENSORRT_LOGGING_H
