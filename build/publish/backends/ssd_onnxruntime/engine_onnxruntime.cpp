//! \file engine_onnxruntime.cpp
//! ONNX Runtime: it reads the request's own memory and writes the response's.

#include "engine.h"
#include "errors.h"
#include "onnxruntime.h"

#include <dlfcn.h>

namespace
{
constexpr char const* kName = "ONNX Runtime";
constexpr char const* kLibrary = "libonnxruntime.so.1";

//! ONNX Runtime's functions and its environment, which all sessions share.
struct Runtime
{
    ~Runtime()
    {
        if (memory != nullptr)
        {
            api->releaseMemoryInfo(memory);
        }
        if (env != nullptr) // neither, nor api, where the library could not be loaded
        {
            api->releaseEnv(env);
        }
    }

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
};

struct Kind
{
    ort::ElementType element;
    Type type;
};

constexpr Kind kKinds[] = {{ort::kUint8, kUint8}, {ort::kInt32, kInt32}, {ort::kFloat, kFp32}};

//! Views of buffers, gone with the run.
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

    //! `tensor` and `memory` must outlive this.
    void add(Tensor const& tensor, int64_t batch, void* memory)
    {
        std::vector<int64_t> shape{batch};
        shape.insert(shape.end(), tensor.row.begin(), tensor.row.end());
        ort::ElementType element{};
        for (Kind const& kind : kKinds)
        {
            element = kind.type.triton == tensor.type.triton ? kind.element : element;
        }
        ort::Value* value{nullptr};
        mRuntime.check(mRuntime.api->createTensorWithDataAsOrtValue(mRuntime.memory, memory,
            tensor.bytes() * static_cast<size_t>(batch), shape.data(), shape.size(), element, &value));
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

class OnnxSession final : public Session
{
public:
    OnnxSession(Runtime const& runtime, std::string const& file, int32_t threads)
        : mRuntime(runtime)
        , mThreads(threads)
    {
        ort::Api const& api = *runtime.api;
        ort::SessionOptions* raw{nullptr};
        runtime.check(api.createSessionOptions(&raw));
        std::unique_ptr<ort::SessionOptions, decltype(api.releaseSessionOptions)> const options(
            raw, api.releaseSessionOptions);
        // An explicit number also keeps ONNX Runtime from pinning its threads: those of all runners to the same cores.
        runtime.check(api.setIntraOpNumThreads(raw, threads));
        runtime.check(api.setInterOpNumThreads(raw, 1));
        // Idle threads that spin take their core from the server's own threads and from the other runners.
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

    ~OnnxSession() override
    {
        mRuntime.api->releaseSession(mSession);
    }

    OnnxSession(OnnxSession const&) = delete;
    OnnxSession& operator=(OnnxSession const&) = delete;

    //! Runners of one thread each run in their callers' threads: the weights are in memory and in the caches once.
    bool shared() const noexcept override
    {
        return mThreads == 1;
    }

    std::unique_ptr<Runner> runner() override;

    void run(Values& given, Values& wanted) const
    {
        mRuntime.check(mRuntime.api->run(mSession, /* options = */ nullptr, given.names(), given.data(), given.size(),
            wanted.names(), wanted.size(), wanted.data()));
    }

    Runtime const& runtime() const noexcept
    {
        return mRuntime;
    }

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
        std::vector<int64_t> shape;
        mRuntime.check(mRuntime.api->castTypeInfoToTensorInfo(type, &info));
        if (info != nullptr)
        {
            ort::ElementType element{};
            size_t dimensions{0};
            mRuntime.check(mRuntime.api->getTensorElementType(info, &element));
            mRuntime.check(mRuntime.api->getDimensionsCount(info, &dimensions));
            shape.resize(dimensions);
            mRuntime.check(mRuntime.api->getDimensions(info, shape.data(), dimensions));
            for (Kind const& kind : kKinds)
            {
                tensor.type = kind.element == element ? kind.type : tensor.type;
            }
        }
        tensor.setShape(shape);
    }

    Runtime const& mRuntime;
    int32_t mThreads;
    ort::Session* mSession{nullptr};
};

class OnnxRunner final : public Runner
{
public:
    explicit OnnxRunner(OnnxSession const& session)
        : mSession(session)
    {
    }

    void run(int64_t batch, std::vector<void*> const& inputs, std::vector<Wanted> const& outputs) override
    {
        Values given(mSession.runtime());
        Values wanted(mSession.runtime());
        for (size_t i = 0; i < inputs.size(); ++i)
        {
            given.add(mSession.inputs[i], batch, inputs[i]);
        }
        for (Wanted const& output : outputs)
        {
            wanted.add(mSession.outputs[output.index], batch, output.memory);
        }
        mSession.run(given, wanted);
    }

private:
    OnnxSession const& mSession;
};

std::unique_ptr<Runner> OnnxSession::runner()
{
    return std::make_unique<OnnxRunner>(*this);
}

class OnnxRuntime final : public Engine
{
public:
    OnnxRuntime()
    {
        void* const library = openBeside(kLibrary, kName);
        auto const base = reinterpret_cast<ort::ApiBase const* (*)()>(dlsym(library, "OrtGetApiBase"));
        mRuntime.api = base != nullptr ? base()->getApi(ort::kVersion) : nullptr;
        if (mRuntime.api == nullptr)
        {
            throw Refused(
                std::string(kLibrary) + " is no ONNX Runtime of version 1.11 or later: publish the model again",
                TRITONSERVER_ERROR_UNSUPPORTED);
        }
        mRuntime.check(mRuntime.api->createEnv(ort::kLogError, "ssd_onnxruntime", &mRuntime.env));
        mRuntime.check(mRuntime.api->createCpuMemoryInfo(ort::kDeviceAllocator, ort::kDefaultMemory, &mRuntime.memory));
        mRuntime.check(mRuntime.api->getAllocatorWithDefaultOptions(&mRuntime.allocator));
    }

    std::unique_ptr<Session> load(std::string const& file, Settings const& settings) const override
    {
        return std::make_unique<OnnxSession>(mRuntime, file, settings.threads);
    }

private:
    Runtime mRuntime;
};
} // namespace

std::unique_ptr<Engine> makeOnnxRuntime()
{
    return std::make_unique<OnnxRuntime>();
}
