//! \file backend.cpp
//! Triton backend `ssd_onnxruntime`: ONNX Runtime on the CPU in the server's own process, behind the contract of
//! docs/design.md.
//!
//! It lies beside libonnxruntime.so.1 in a folder of backends (tritonserver --backend-directory); version folders hold
//! data only. ONNX Runtime reads the request's own memory and writes the response's. Every request runs alone, so that a row's
//! bits never depend on its neighbours, and one bad request is answered with its own error while the others of the call
//! go on. build/publish/backends/python/model.py does the same where there is no compiler.

#include "metrics.h"
#include "onnxruntime.h"
#include "sha256.h"
#include "triton.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <dlfcn.h>
#include <exception>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace
{
constexpr char const* kContract = "1";
constexpr char const* kLibrary = "libonnxruntime.so.1";
constexpr size_t kAlignment = 16; //!< Buffers that are not are copied: kernels may load vectors.

// -- errors -------------------------------------------------------------------------------------------------------

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
void check(TRITONSERVER_Error* error)
{
    if (error != nullptr)
    {
        std::string const message = TRITONSERVER_ErrorMessage(error);
        TRITONSERVER_ErrorDelete(error);
        throw Refused(message, TRITONSERVER_ERROR_INTERNAL);
    }
}

//! Logs what Triton says went wrong, where nobody is left to be told.
void logged(TRITONSERVER_Error* error) noexcept
{
    if (error != nullptr)
    {
        TRITONSERVER_LogMessage(TRITONSERVER_LOG_ERROR, __FILE__, __LINE__, TRITONSERVER_ErrorMessage(error));
        TRITONSERVER_ErrorDelete(error);
    }
}

//! The exception that is on its way, for Triton: none leaves the library.
TRITONSERVER_Error* caught() noexcept
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

// -- ONNX Runtime -------------------------------------------------------------------------------------------------

//! ONNX Runtime's functions and its environment, which all sessions of this backend share, and the families of metrics.
class Runtime
{
public:
    //! \throw Refused where the library beside this one cannot be loaded.
    Runtime()
    {
        Dl_info self{};
        if (dladdr(reinterpret_cast<void const*>(&caught), &self) == 0 || self.dli_fname == nullptr)
        {
            throw Refused("the backend's own file cannot be found", TRITONSERVER_ERROR_NOT_FOUND);
        }
        std::string path = self.dli_fname;
        path = path.substr(0, path.rfind('/') + 1) + kLibrary;
        // Never closed: it has threads and thread-local state of its own.
        void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw Refused(std::string("ONNX Runtime cannot be loaded, publish the model again: ") + dlerror(),
                TRITONSERVER_ERROR_NOT_FOUND);
        }
        auto const base = reinterpret_cast<ort::ApiBase const* (*)()>(dlsym(library, "OrtGetApiBase"));
        api = base != nullptr ? base()->getApi(ort::kVersion) : nullptr;
        if (api == nullptr)
        {
            throw Refused(path + " is no ONNX Runtime of version 1.11 or later: publish the model again",
                TRITONSERVER_ERROR_UNSUPPORTED);
        }
        check(api->createEnv(ort::kLogError, "ssd_onnxruntime", &env));
        check(api->createCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, &memory));
        check(api->getAllocatorWithDefaultOptions(&allocator));
    }

    ~Runtime()
    {
        api->releaseMemoryInfo(memory);
        api->releaseEnv(env);
    }

    Runtime(Runtime const&) = delete;
    Runtime& operator=(Runtime const&) = delete;

    //! \throw std::runtime_error with what ONNX Runtime says went wrong.
    void check(ort::Status* status) const
    {
        if (status != nullptr)
        {
            std::string const message = api->getErrorMessage(status);
            api->releaseStatus(status);
            throw std::runtime_error("ONNX Runtime failed: " + message);
        }
    }

    ort::Api const* api{nullptr};
    ort::Env* env{nullptr};
    ort::MemoryInfo* memory{nullptr};
    ort::Allocator* allocator{nullptr};
    metrics::Families families;
};

//! One type of the contract, as each side calls it.
struct Type
{
    ort::ElementType onnx;
    TRITONSERVER_DataType triton;
    char const* name;
    size_t bytes;
};

constexpr Type kTypes[] = {
    {ort::kUint8, TRITONSERVER_TYPE_UINT8, "UINT8", 1},
    {ort::kInt32, TRITONSERVER_TYPE_INT32, "INT32", 4},
    {ort::kFloat, TRITONSERVER_TYPE_FP32, "FP32", 4},
};

//! An input or output of the ONNX file. The first dimension is the batch.
struct Tensor
{
    std::string name;
    Type type;
    std::vector<int64_t> shape;

    //! Bytes of a tensor with the present batch.
    size_t bytes() const noexcept
    {
        size_t bytes = type.bytes;
        for (int64_t const size : shape)
        {
            bytes *= static_cast<size_t>(size);
        }
        return bytes;
    }

    //! Sizes of one row as Triton's JSON writes them, such as [300,300,3].
    std::string dims() const
    {
        std::string text = "[";
        for (size_t i = 1; i < shape.size(); ++i)
        {
            text += (i > 1 ? "," : "") + std::to_string(shape[i]);
        }
        return text + "]";
    }
};

//! A loaded ONNX file. Several may run it at once.
class Session
{
public:
    //! \param file The content of an ONNX file.
    //! \throw Refused, std::runtime_error where it cannot be loaded, or has other tensors than the contract's kind.
    Session(Runtime const& runtime, std::string const& file, int32_t threads)
        : mRuntime(runtime)
    {
        ort::Api const& api = *runtime.api;
        ort::SessionOptions* raw{nullptr};
        runtime.check(api.createSessionOptions(&raw));
        std::unique_ptr<ort::SessionOptions, decltype(api.releaseSessionOptions)> const options(
            raw, api.releaseSessionOptions);
        // An explicit number also keeps ONNX Runtime from pinning its threads: those of all instances to the same
        // cores.
        runtime.check(api.setIntraOpNumThreads(raw, threads));
        runtime.check(api.setInterOpNumThreads(raw, 1));
        // Idle threads that spin take their core from the server's own threads and from the other instances.
        runtime.check(api.addSessionConfigEntry(raw, "session.intra_op.allow_spinning", "0"));
        runtime.check(api.createSessionFromArray(runtime.env, file.data(), file.size(), raw, &mSession));
        try
        {
            read(api.sessionGetInputCount, api.sessionGetInputName, api.sessionGetInputTypeInfo, inputs);
            read(api.sessionGetOutputCount, api.sessionGetOutputName, api.sessionGetOutputTypeInfo, outputs);
        }
        catch (...)
        {
            api.releaseSession(mSession);
            throw;
        }
    }

    ~Session()
    {
        mRuntime.api->releaseSession(mSession);
    }

    Session(Session const&) = delete;
    Session& operator=(Session const&) = delete;

    ort::Session* get() const noexcept
    {
        return mSession;
    }

    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;

private:
    template <typename GetCount, typename GetName, typename GetType>
    void read(GetCount getCount, GetName getName, GetType getType, std::vector<Tensor>& tensors) const
    {
        size_t count{0};
        mRuntime.check(getCount(mSession, &count));
        for (size_t i = 0; i < count; ++i)
        {
            char* name{nullptr};
            mRuntime.check(getName(mSession, i, mRuntime.allocator, &name));
            tensors.push_back({name, {}, {}});
            mRuntime.check(mRuntime.api->allocatorFree(mRuntime.allocator, name));
            ort::TypeInfo* raw{nullptr};
            mRuntime.check(getType(mSession, i, &raw));
            std::unique_ptr<ort::TypeInfo, decltype(mRuntime.api->releaseTypeInfo)> const info(
                raw, mRuntime.api->releaseTypeInfo);
            describe(raw, tensors.back());
        }
    }

    void describe(ort::TypeInfo const* type, Tensor& tensor) const
    {
        ort::TensorInfo const* info{nullptr};
        ort::ElementType element{};
        size_t dimensions{0};
        mRuntime.check(mRuntime.api->castTypeInfoToTensorInfo(type, &info));
        if (info != nullptr)
        {
            mRuntime.check(mRuntime.api->getTensorElementType(info, &element));
            mRuntime.check(mRuntime.api->getDimensionsCount(info, &dimensions));
            tensor.shape.resize(dimensions);
            mRuntime.check(mRuntime.api->getDimensions(info, tensor.shape.data(), dimensions));
        }
        for (Type const& known : kTypes)
        {
            if (known.onnx == element)
            {
                tensor.type = known;
            }
        }
        bool fits = tensor.type.name != nullptr && dimensions > 0 && tensor.shape[0] < 0;
        for (size_t i = 1; i < dimensions; ++i)
        {
            fits = fits && tensor.shape[i] > 0;
        }
        if (!fits)
        {
            throw Refused("model.onnx: " + tensor.name
                + " is no tensor of UINT8, INT32 or FP32 with an open batch and otherwise fixed sizes");
        }
    }

    Runtime const& mRuntime;
    ort::Session* mSession{nullptr};
};

//! ONNX Runtime's views of buffers, gone with the run.
class Values
{
public:
    explicit Values(Runtime const& runtime)
        : mRuntime(runtime)
    {
    }

    ~Values()
    {
        for (ort::Value* const value : mValues)
        {
            mRuntime.api->releaseValue(value);
        }
    }

    Values(Values const&) = delete;
    Values& operator=(Values const&) = delete;

    //! `tensor` must outlive this, and so must `buffer`, with bytes() bytes.
    void add(Tensor const& tensor, void* buffer)
    {
        ort::Value* value{nullptr};
        mRuntime.check(mRuntime.api->createTensorWithDataAsOrtValue(mRuntime.memory, buffer, tensor.bytes(),
            tensor.shape.data(), tensor.shape.size(), tensor.type.onnx, &value));
        mValues.push_back(value);
        mNames.push_back(tensor.name.c_str());
    }

    ort::Value** data() noexcept
    {
        return mValues.data();
    }

    char const* const* names() const noexcept
    {
        return mNames.data();
    }

    size_t size() const noexcept
    {
        return mValues.size();
    }

private:
    Runtime const& mRuntime;
    std::vector<ort::Value*> mValues;
    std::vector<char const*> mNames;
};

// -- the model ----------------------------------------------------------------------------------------------------

//! config.pbtxt as Triton hands it over: JSON without blanks, members in the order of model_config.proto. A quote
//! inside a value is escaped there, so that a member's beginning is found by its very text.
class Config
{
public:
    explicit Config(TRITONBACKEND_Model* model)
    {
        TRITONSERVER_Message* message{nullptr};
        check(TRITONBACKEND_ModelConfig(model, /* configVersion = */ 1, &message));
        char const* text{nullptr};
        size_t size{0};
        TRITONSERVER_Error* const error = TRITONSERVER_MessageSerializeToJson(message, &text, &size);
        if (error == nullptr)
        {
            mText.assign(text, size);
        }
        logged(TRITONSERVER_MessageDelete(message));
        check(error);
    }

    //! A parameter's value; empty where there is none of that name.
    std::string parameter(std::string const& name) const
    {
        return between("\"" + name + "\":{\"string_value\":\"", "\"");
    }

    //! Holds every input and output of the ONNX file against its entry, and the other way round.
    //! \throw Refused naming the first difference.
    void require(Session const& session) const
    {
        std::string const middle = "\",\"data_type\":\"TYPE_";
        std::vector<Tensor> tensors = session.inputs;
        tensors.insert(tensors.end(), session.outputs.begin(), session.outputs.end());
        for (Tensor const& tensor : tensors)
        {
            std::string const begin = "\"name\":\"" + tensor.name + middle;
            std::string const type = between(begin, "\"");
            size_t const entry = mText.find(begin);
            std::string const dims = type.empty() ? "" : between("\"dims\":", "]", entry) + "]";
            if (type.empty())
            {
                throw Refused("config.pbtxt has no " + tensor.name + ", model.onnx has: publish the model again");
            }
            if (type != tensor.type.name || dims != tensor.dims())
            {
                throw Refused(tensor.name + " is " + type + " " + dims + " in config.pbtxt and " + tensor.type.name
                    + " " + tensor.dims() + " in model.onnx: publish the model again");
            }
        }
        size_t entries{0};
        for (size_t at = mText.find(middle); at != std::string::npos; at = mText.find(middle, at + 1))
        {
            ++entries;
        }
        if (entries != tensors.size())
        {
            throw Refused("config.pbtxt has " + std::to_string(entries) + " inputs and outputs, model.onnx has "
                + std::to_string(tensors.size()) + ": publish the model again");
        }
    }

private:
    std::string between(std::string const& begin, char const* end, size_t after = 0) const
    {
        size_t const found = mText.find(begin, after);
        size_t const from = found + begin.size();
        return found == std::string::npos ? "" : mText.substr(from, mText.find(end, from) - from);
    }

    std::string mText;
};

//! What the instances of a model have in common.
class Model
{
public:
    //! \throw Refused, std::runtime_error where the model cannot be served as configured.
    Model(Runtime const& runtime, TRITONBACKEND_Model* model)
        : mRuntime(runtime)
    {
        TRITONBACKEND_ArtifactType type{};
        char const* folder{nullptr};
        uint64_t version{0};
        check(TRITONBACKEND_ModelRepository(model, &type, &folder));
        check(TRITONBACKEND_ModelVersion(model, &version));
        mPath = std::string(folder) + "/" + std::to_string(version) + "/model.onnx";
        Config const config(model);
        std::string const contract = config.parameter("contract");
        if (contract != kContract)
        {
            throw Refused("config.pbtxt speaks contract '" + contract + "', this backend speaks '" + kContract
                + "': publish the model again");
        }
        mThreads = number(config.parameter("threads"));
        mDigest = config.parameter("model_sha256");
        mShared = std::make_shared<Session>(mRuntime, file(), mThreads);
        config.require(*mShared);
        char const* name{nullptr};
        check(TRITONBACKEND_ModelName(model, &name));
        mMetrics = std::make_unique<metrics::Metrics>(runtime.families, name, std::to_string(version));
    }

    Model(Model const&) = delete;
    Model& operator=(Model const&) = delete;

    //! Instances of one thread each run in their callers' threads and share a session: its weights are in memory and in
    //! the caches once. One of several threads needs a session for those threads.
    std::shared_ptr<Session> session()
    {
        bool const first = !mTaken.exchange(true);
        return mThreads == 1 || first ? mShared : std::make_shared<Session>(mRuntime, file(), mThreads);
    }

    metrics::Metrics const& metrics() const noexcept
    {
        return *mMetrics;
    }

    Runtime const& runtime() const noexcept
    {
        return mRuntime;
    }

private:
    //! model.onnx, as it was published. The bytes that were compared are the ones that are loaded, even if the file is
    //! written to meanwhile.
    std::string file() const
    {
        std::ifstream stream(mPath, std::ios::binary | std::ios::ate);
        if (!stream)
        {
            throw Refused(mPath + " is missing: publish the model again", TRITONSERVER_ERROR_NOT_FOUND);
        }
        std::string content(static_cast<size_t>(std::max<std::streamoff>(stream.tellg(), 0)), '\0');
        stream.seekg(0);
        stream.read(content.data(), static_cast<std::streamsize>(content.size()));
        if (!stream || (!mDigest.empty() && sha256::digest(content) != mDigest))
        {
            throw Refused(mPath
                + " is not the file that was published (SHA-256 differs): it is damaged or half-copied; publish the "
                  "model again");
        }
        return content;
    }

    static int32_t number(std::string const& threads)
    {
        bool const whole = threads.size() < 5 && threads.find_first_not_of("0123456789") == std::string::npos;
        int32_t const value = threads.empty() ? 1 : whole ? std::stoi(threads) : 0;
        if (value < 1)
        {
            throw Refused("parameter threads is '" + threads + "', expected a whole number of at least 1");
        }
        return value;
    }

    Runtime const& mRuntime;
    std::string mPath;
    std::string mDigest; //!< of model.onnx; empty = not known
    std::unique_ptr<metrics::Metrics> mMetrics;
    int32_t mThreads{1};
    std::shared_ptr<Session> mShared;
    std::atomic<bool> mTaken{false}; //!< Instances are made in parallel.
};

// -- an instance --------------------------------------------------------------------------------------------------

//! Memory that begins at a multiple of kAlignment and is kept for the next time.
class Scratch
{
public:
    void* atLeast(size_t bytes)
    {
        if (mMemory.size() < bytes + kAlignment)
        {
            mMemory.resize(bytes + kAlignment);
        }
        auto const address = reinterpret_cast<uintptr_t>(mMemory.data());
        return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }

private:
    std::vector<char> mMemory;
};

bool aligned(void const* pointer) noexcept
{
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

uint64_t now() noexcept
{
    auto const time = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

//! What answers requests one after the other. Triton never calls one instance twice at once.
class Instance
{
public:
    //! Runs one blank image: the first client does not pay for first allocations, and what cannot run does not load.
    Instance(Model& model, TRITONBACKEND_ModelInstance* instance)
        : mInstance(instance)
        , mModel(model)
        , mRuntime(model.runtime())
        , mSession(model.session())
        , mInputs(mSession->inputs)
        , mOutputs(mSession->outputs)
        , mScratch(mInputs.size() + mOutputs.size())
    {
        Values inputs(mRuntime);
        Values outputs(mRuntime);
        setBatch(1);
        for (size_t i = 0; i < mInputs.size(); ++i)
        {
            void* const blank = mScratch[i].atLeast(mInputs[i].bytes());
            std::memset(blank, 0, mInputs[i].bytes());
            inputs.add(mInputs[i], blank);
        }
        for (size_t i = 0; i < mOutputs.size(); ++i)
        {
            outputs.add(mOutputs[i], mScratch[mInputs.size() + i].atLeast(mOutputs[i].bytes()));
        }
        compute(inputs, outputs);
    }

    //! Answers a request with its result or with its own error, and releases it.
    //! What the client got wrong, or gave up, is no failure in Triton's statistics, where alerts look.
    void execute(TRITONBACKEND_Request* request) noexcept
    {
        Times times{now(), 0, 0};
        TRITONBACKEND_Response* response{nullptr};
        TRITONSERVER_Error* error = TRITONBACKEND_ResponseNew(&response, request);
        bool const answerable = error == nullptr;
        if (answerable)
        {
            error = guarded(
                [&]
                {
                    requireWaiting(request);
                    run(request, response, times);
                });
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
            logged(TRITONBACKEND_ModelInstanceReportBatchStatistics(mInstance,
                static_cast<uint64_t>(mInputs.front().shape.front()), times.begun, times.computeBegun,
                times.computeEnded, ended));
        }
        logged(TRITONBACKEND_RequestRelease(request, kReleaseAll));
    }

private:
    struct Times
    {
        uint64_t begun;
        uint64_t computeBegun;
        uint64_t computeEnded;
    };

    struct Copy
    {
        void* to;
        void const* from;
        size_t bytes;
    };

    //! \throw Refused where nobody waits for the answer any more.
    static void requireWaiting(TRITONBACKEND_Request* request)
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

    void setBatch(int64_t batch) noexcept
    {
        for (std::vector<Tensor>* const side : {&mInputs, &mOutputs})
        {
            for (Tensor& tensor : *side)
            {
                tensor.shape.front() = batch;
            }
        }
    }

    void compute(Values& inputs, Values& outputs) const
    {
        mRuntime.check(mRuntime.api->run(mSession->get(), /* options = */ nullptr, inputs.names(), inputs.data(),
            inputs.size(), outputs.names(), outputs.size(), outputs.data()));
    }

    void run(TRITONBACKEND_Request* request, TRITONBACKEND_Response* response, Times& times)
    {
        times.computeBegun = times.computeEnded = times.begun; // until it comes to that
        Values inputs(mRuntime);
        Values outputs(mRuntime);
        for (size_t i = 0; i < mInputs.size(); ++i)
        {
            inputs.add(mInputs[i], input(request, i));
        }
        uint32_t wanted{0};
        int32_t const* detections{nullptr};
        std::vector<Copy> copies;
        check(TRITONBACKEND_RequestOutputCount(request, &wanted));
        for (uint32_t i = 0; i < wanted; ++i)
        {
            char const* name{nullptr};
            check(TRITONBACKEND_RequestOutputName(request, i, &name));
            size_t index{0};
            while (index < mOutputs.size() && mOutputs[index].name != name)
            {
                ++index;
            }
            if (index == mOutputs.size())
            {
                throw Refused("there is no output " + std::string(name));
            }
            void* const values = output(response, index, copies);
            outputs.add(mOutputs[index], values);
            if (mOutputs[index].name == "num_detections")
            {
                detections = static_cast<int32_t const*>(values);
            }
        }
        times.computeBegun = now();
        compute(inputs, outputs);
        times.computeEnded = now();
        if (detections != nullptr)
        {
            mModel.metrics().countDetections(detections, static_cast<size_t>(mInputs.front().shape.front()));
        }
        for (Copy const& copy : copies)
        {
            std::memcpy(copy.to, copy.from, copy.bytes);
        }
    }

    //! An input's values: the request's own memory where that is one aligned piece, else a copy.
    void* input(TRITONBACKEND_Request* request, size_t index)
    {
        Tensor const& tensor = mInputs[index];
        TRITONBACKEND_Input* input{nullptr};
        int64_t const* shape{nullptr};
        uint64_t bytes{0};
        uint32_t pieces{0};
        check(TRITONBACKEND_RequestInput(request, tensor.name.c_str(), &input));
        check(TRITONBACKEND_InputProperties(input, nullptr, nullptr, &shape, nullptr, &bytes, &pieces));
        if (index == 0)
        {
            setBatch(shape[0]);
        }
        if (bytes
            != tensor.bytes()) // Triton holds shapes against config.pbtxt, but not one input's batch against another's
        {
            throw Refused("input " + tensor.name + " has " + std::to_string(bytes) + " bytes, expected "
                + std::to_string(tensor.bytes()) + " for a batch of " + std::to_string(tensor.shape[0]));
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
                values = const_cast<void*>(piece); // ONNX Runtime writes to no input
                break;
            }
            values = mScratch[index].atLeast(bytes);
            std::memcpy(static_cast<char*>(values) + filled, piece, size);
            filled += size;
        }
        if (tensor.name == "score_threshold" || tensor.name == "iou_threshold")
        {
            requireThresholds(tensor, static_cast<float const*>(values));
        }
        return values;
    }

    //! Where an output goes: the response's own memory where that is aligned, else memory that is noted as to be
    //! copied.
    void* output(TRITONBACKEND_Response* response, size_t index, std::vector<Copy>& copies)
    {
        Tensor const& tensor = mOutputs[index];
        TRITONBACKEND_Output* output{nullptr};
        check(TRITONBACKEND_ResponseOutput(response, &output, tensor.name.c_str(), tensor.type.triton,
            tensor.shape.data(), static_cast<uint32_t>(tensor.shape.size())));
        void* buffer{nullptr};
        TRITONSERVER_MemoryType memory{TRITONSERVER_MEMORY_CPU};
        int64_t memoryId{0};
        check(TRITONBACKEND_OutputBuffer(output, &buffer, tensor.bytes(), &memory, &memoryId));
        requireCpu(memory, "output " + tensor.name);
        if (aligned(buffer))
        {
            return buffer;
        }
        void* const own = mScratch[mInputs.size() + index].atLeast(tensor.bytes());
        copies.push_back({buffer, own, tensor.bytes()});
        return own;
    }

    static void requireCpu(TRITONSERVER_MemoryType memory, std::string const& what)
    {
        if (memory == TRITONSERVER_MEMORY_GPU)
        {
            throw Refused(what + " is in GPU memory, but this model runs on the CPU: use system shared memory or none",
                TRITONSERVER_ERROR_UNSUPPORTED);
        }
    }

    static void requireThresholds(Tensor const& tensor, float const* values)
    {
        bool right{true};
        std::ostringstream all;
        for (size_t i = 0; i < tensor.bytes() / sizeof(float); ++i)
        {
            right = right && values[i] >= 0.0F && values[i] <= 1.0F; // false for NaN as well
        }
        if (!right)
        {
            all.precision(9);
            for (size_t i = 0; i < tensor.bytes() / sizeof(float); ++i)
            {
                all << (i > 0 ? ", " : "") << values[i];
            }
            throw Refused(tensor.name + " must lie in 0..1, got [" + all.str() + "]");
        }
    }

    TRITONBACKEND_ModelInstance* mInstance;
    Model const& mModel;
    Runtime const& mRuntime;
    std::shared_ptr<Session> mSession;
    std::vector<Tensor> mInputs; //!< with the batch of the present request
    std::vector<Tensor> mOutputs; //!< likewise
    std::vector<Scratch> mScratch; //!< of every input, then of every output
};

//! An object of ours that Triton keeps for us; nullptr where it was not made.
template <typename Object, typename Owner>
Object* kept(Owner* owner, TRITONSERVER_Error* (*getState)(Owner*, void**))
{
    void* state{nullptr};
    check(getState(owner, &state));
    return static_cast<Object*>(state);
}

template <typename Object, typename Owner>
void keep(std::unique_ptr<Object> object, Owner* owner, TRITONSERVER_Error* (*setState)(Owner*, void*))
{
    check(setState(owner, object.get()));
    static_cast<void>(object.release());
}
} // namespace

#define SSD_EXPORT extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error*

SSD_EXPORT TRITONBACKEND_Initialize(TRITONBACKEND_Backend* backend)
{
    return guarded(
        [&]
        {
            uint32_t major{0};
            uint32_t minor{0};
            check(TRITONBACKEND_ApiVersion(&major, &minor));
            if (major != kTritonMajor || minor < kTritonMinor)
            {
                throw Refused("this server has version " + std::to_string(major) + "." + std::to_string(minor)
                        + " of the backend interface, needed is " + std::to_string(kTritonMajor) + "."
                        + std::to_string(kTritonMinor) + " or later: use Triton 2.37 or later",
                    TRITONSERVER_ERROR_UNSUPPORTED);
            }
            keep(std::make_unique<Runtime>(), backend, TRITONBACKEND_BackendSetState);
        });
}

SSD_EXPORT TRITONBACKEND_Finalize(TRITONBACKEND_Backend* backend)
{
    return guarded([&] { delete kept<Runtime>(backend, TRITONBACKEND_BackendState); });
}

SSD_EXPORT TRITONBACKEND_GetBackendAttribute(
    TRITONBACKEND_Backend* /* backend */, TRITONBACKEND_BackendAttribute* attributes)
{
    return TRITONBACKEND_BackendAttributeSetParallelModelInstanceLoading(attributes, /* enabled = */ true);
}

SSD_EXPORT TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model)
{
    return guarded(
        [&]
        {
            TRITONBACKEND_Backend* backend{nullptr};
            check(TRITONBACKEND_ModelBackend(model, &backend));
            auto const& runtime = *kept<Runtime>(backend, TRITONBACKEND_BackendState);
            keep(std::make_unique<Model>(runtime, model), model, TRITONBACKEND_ModelSetState);
        });
}

SSD_EXPORT TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model)
{
    return guarded([&] { delete kept<Model>(model, TRITONBACKEND_ModelState); });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance)
{
    return guarded(
        [&]
        {
            TRITONBACKEND_Model* model{nullptr};
            check(TRITONBACKEND_ModelInstanceModel(instance, &model));
            auto& common = *kept<Model>(model, TRITONBACKEND_ModelState);
            keep(std::make_unique<Instance>(common, instance), instance, TRITONBACKEND_ModelInstanceSetState);
        });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* instance)
{
    return guarded([&] { delete kept<Instance>(instance, TRITONBACKEND_ModelInstanceState); });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, uint32_t count)
{
    return guarded(
        [&]
        {
            auto& answering = *kept<Instance>(instance, TRITONBACKEND_ModelInstanceState);
            for (uint32_t i = 0; i < count; ++i)
            {
                answering.execute(requests[i]);
            }
        });
}
