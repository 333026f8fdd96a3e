//! \file instance.cpp
//! From a request to its answer. Every request runs alone, so that a row's bits never depend on its neighbours, and one
//! bad request is answered with its own error while the others of the call go on.

#include "instance.h"

#include <chrono>
#include <cstring>
#include <sstream>

namespace
{
uint64_t now() noexcept
{
    auto const time = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

//! \throw Refused where nobody waits for the answer any more.
void requireWaiting(TRITONBACKEND_Request* request)
{
    bool cancelled{false};
    if (TRITONBACKEND_RequestIsCancelled != nullptr)
    {
        check(TRITONBACKEND_RequestIsCancelled(request, &cancelled));
    }
    if (cancelled)
    {
        throw Refused("the client gave the request up before it ran", TRITONSERVER_ERROR_CANCELLED);
    }
}

void requireCpu(TRITONSERVER_MemoryType memory, std::string const& what)
{
    if (memory == TRITONSERVER_MEMORY_GPU)
    {
        throw Refused(what + " is in GPU memory, but this model runs on the CPU: use system shared memory or none",
            TRITONSERVER_ERROR_UNSUPPORTED);
    }
}

void requireThresholds(std::string const& name, float const* values, size_t count)
{
    bool right{true};
    for (size_t i = 0; i < count; ++i)
    {
        right = right && values[i] >= 0.0F && values[i] <= 1.0F; // false for NaN as well
    }
    if (!right)
    {
        std::ostringstream all;
        all.precision(9);
        for (size_t i = 0; i < count; ++i)
        {
            all << (i > 0 ? ", " : "") << values[i];
        }
        throw Refused(name + " must lie in 0..1, got [" + all.str() + "]");
    }
}
} // namespace

Instance::Instance(Model& model, TRITONBACKEND_ModelInstance* instance)
    : mInstance(instance)
    , mModel(model)
    , mScratch(model.inputs().size() + model.outputs().size())
{
    model.addRunner();
}

void Instance::execute(TRITONBACKEND_Request* request) noexcept
{
    Times times{now(), 0, 0};
    TRITONBACKEND_Response* response{nullptr};
    TRITONSERVER_Error* error = TRITONBACKEND_ResponseNew(&response, request);
    bool const answerable = error == nullptr;
    if (answerable)
    {
        error = guarded([&] { run(request, response, times); });
    }
    bool const success = error == nullptr;
    bool const invalid = !success && TRITONSERVER_ErrorCode(error) == TRITONSERVER_ERROR_INVALID_ARG;
    bool const failed = !success && !invalid && TRITONSERVER_ErrorCode(error) != TRITONSERVER_ERROR_CANCELLED;
    if (invalid)
    {
        mModel.metrics().countClientError();
    }
    uint64_t const ended = now();
    if (success)
    {
        mModel.metrics().countExecution(ended - times.begun);
    }
    if (answerable)
    {
        logged(TRITONBACKEND_ResponseSend(response, kResponseFinal, error));
        if (!success)
        {
            TRITONSERVER_ErrorDelete(error); // sending leaves it to the sender
        }
    }
    else
    {
        logged(error);
    }
    if (success || failed)
    {
        logged(TRITONBACKEND_ModelInstanceReportStatistics(
            mInstance, request, success, times.begun, times.computeBegun, times.computeEnded, ended));
    }
    if (success)
    {
        logged(TRITONBACKEND_ModelInstanceReportBatchStatistics(
            mInstance, static_cast<uint64_t>(mBatch), times.begun, times.computeBegun, times.computeEnded, ended));
    }
    logged(TRITONBACKEND_RequestRelease(request, kReleaseAll));
}

void Instance::run(TRITONBACKEND_Request* request, TRITONBACKEND_Response* response, Times& times)
{
    times.computeBegun = times.computeEnded = times.begun; // until it comes to that
    requireWaiting(request);
    std::vector<void*> given;
    for (size_t i = 0; i < mModel.inputs().size(); ++i)
    {
        given.push_back(input(request, i));
    }
    uint32_t count{0};
    int32_t const* detections{nullptr};
    std::vector<Wanted> wanted;
    std::vector<Copy> copies;
    check(TRITONBACKEND_RequestOutputCount(request, &count));
    for (uint32_t i = 0; i < count; ++i)
    {
        char const* name{nullptr};
        check(TRITONBACKEND_RequestOutputName(request, i, &name));
        size_t index{0};
        while (index < mModel.outputs().size() && mModel.outputs()[index].name != name)
        {
            ++index;
        }
        if (index == mModel.outputs().size())
        {
            throw Refused("there is no output " + std::string(name));
        }
        wanted.push_back({index, output(response, index, copies)});
        if (mModel.outputs()[index].name == "num_detections")
        {
            detections = static_cast<int32_t const*>(wanted.back().memory);
        }
    }
    uint64_t const ready = now();
    mModel.runners().run(
        [&](Runner& runner)
        {
            times.computeBegun = now();
            times.begun += times.computeBegun - ready; // Triton counts what lies before as waiting in its queue
            times.computeEnded = times.computeBegun;
            requireWaiting(request);
            runner.run(mBatch, given, wanted);
            times.computeEnded = now();
        });
    if (detections != nullptr)
    {
        mModel.metrics().countDetections(detections, static_cast<size_t>(mBatch));
    }
    for (Copy const& copy : copies)
    {
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

//! An input's values: the request's own memory where that is one aligned piece, else a copy.
void* Instance::input(TRITONBACKEND_Request* request, size_t index)
{
    Tensor const& tensor = mModel.inputs()[index];
    TRITONBACKEND_Input* input{nullptr};
    int64_t const* shape{nullptr};
    uint64_t bytes{0};
    uint32_t pieces{0};
    check(TRITONBACKEND_RequestInput(request, tensor.name.c_str(), &input));
    check(TRITONBACKEND_InputProperties(input, nullptr, nullptr, &shape, nullptr, &bytes, &pieces));
    if (index == 0)
    {
        mBatch = shape[0];
    }
    uint64_t const expected = tensor.bytes() * static_cast<uint64_t>(mBatch);
    if (bytes != expected) // Triton holds shapes against config.pbtxt, but not one input's batch against another's
    {
        throw Refused("input " + tensor.name + " has " + std::to_string(bytes) + " bytes, expected "
            + std::to_string(expected) + " for a batch of " + std::to_string(mBatch));
    }
    void* values{nullptr};
    size_t filled{0};
    for (uint32_t i = 0; i < pieces; ++i)
    {
        void const* piece{nullptr};
        uint64_t size{0};
        TRITONSERVER_MemoryType memory{TRITONSERVER_MEMORY_CPU};
        int64_t memoryId{0};
        check(TRITONBACKEND_InputBuffer(input, i, &piece, &size, &memory, &memoryId));
        requireCpu(memory, "input " + tensor.name);
        if (pieces == 1 && aligned(piece))
        {
            values = const_cast<void*>(piece); // no engine writes to an input
            break;
        }
        values = mScratch[index].atLeast(bytes);
        std::memcpy(static_cast<char*>(values) + filled, piece, size);
        filled += size;
    }
    if (tensor.name == "score_threshold" || tensor.name == "iou_threshold")
    {
        requireThresholds(tensor.name, static_cast<float const*>(values), bytes / sizeof(float));
    }
    return values;
}

//! Where an output goes: the response's own memory where that is aligned, else memory that is noted as to be copied.
void* Instance::output(TRITONBACKEND_Response* response, size_t index, std::vector<Copy>& copies)
{
    Tensor const& tensor = mModel.outputs()[index];
    std::vector<int64_t> shape{mBatch};
    shape.insert(shape.end(), tensor.row.begin(), tensor.row.end());
    size_t const bytes = tensor.bytes() * static_cast<size_t>(mBatch);
    TRITONBACKEND_Output* output{nullptr};
    check(TRITONBACKEND_ResponseOutput(
        response, &output, tensor.name.c_str(), tensor.type.triton, shape.data(), static_cast<uint32_t>(shape.size())));
    void* buffer{nullptr};
    TRITONSERVER_MemoryType memory{TRITONSERVER_MEMORY_CPU};
    int64_t memoryId{0};
    check(TRITONBACKEND_OutputBuffer(output, &buffer, bytes, &memory, &memoryId));
    requireCpu(memory, "output " + tensor.name);
    if (aligned(buffer))
    {
        return buffer;
    }
    void* const own = mScratch[mModel.inputs().size() + index].atLeast(bytes);
    copies.push_back({buffer, own, bytes});
    return own;
}
