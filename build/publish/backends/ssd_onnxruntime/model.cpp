//! \file model.cpp
//! Loading a model: its configuration, its file and its runners.

#include "model.h"

#include "config.h"
#include "sha256.h"

#include <algorithm>
#include <cstring>
#include <fstream>

namespace
{
constexpr char const* kContract = "1";
constexpr char const* kOnnxRuntime = "onnxruntime";
constexpr char const* kOpenVino = "openvino";
} // namespace

// -- Backend ------------------------------------------------------------------------------------------------------

Engine const& Backend::engine(std::string const& name)
{
    std::lock_guard<std::mutex> const lock(mMutex);
    std::unique_ptr<Engine>& engine = mEngines[name];
    if (engine == nullptr)
    {
        if (name != kOnnxRuntime && name != kOpenVino)
        {
            throw Refused("parameter engine is '" + name + "', expected " + kOnnxRuntime + " or " + kOpenVino);
        }
        engine = name == kOpenVino ? makeOpenVino() : makeOnnxRuntime();
    }
    return *engine;
}

// -- Runners ------------------------------------------------------------------------------------------------------

Runners::~Runners()
{
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        mEnding = true;
    }
    mChanged.notify_all();
    for (std::thread& thread : mThreads)
    {
        thread.join();
    }
}

void Runners::add(std::unique_ptr<Runner> runner)
{
    std::lock_guard<std::mutex> const lock(mMutex);
    Runner& added = *runner;
    mRunners.push_back(std::move(runner));
    mThreads.emplace_back([this, &added] { serve(added); });
}

void Runners::run(std::function<void(Runner&)> work)
{
    std::packaged_task<void(Runner&)> task(std::move(work));
    std::future<void> done = task.get_future();
    {
        std::lock_guard<std::mutex> const lock(mMutex);
        mWaiting.push_back(std::move(task));
    }
    mChanged.notify_one();
    done.get();
}

void Runners::serve(Runner& runner)
{
    std::unique_lock<std::mutex> lock(mMutex);
    while (true)
    {
        mChanged.wait(lock, [this] { return mEnding || !mWaiting.empty(); });
        if (mWaiting.empty())
        {
            return;
        }
        std::packaged_task<void(Runner&)> task = std::move(mWaiting.front());
        mWaiting.pop_front();
        lock.unlock();
        task(runner);
        lock.lock();
    }
}

// -- Model --------------------------------------------------------------------------------------------------------

Model::Model(Backend& backend, TRITONBACKEND_Model* model)
    : mBackend(backend)
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
    mEngine = config.parameter("engine", kOnnxRuntime);
    mSettings.threads = config.number("threads", "1");
    mMost = config.parameter("runners").empty() ? 0 : config.number("runners", "");
    mSettings.runners = std::max(1, mMost);
    mSettings.precision = config.parameter("engine_precision", "f32");
    mDigest = config.parameter("model_sha256");
    mSession = mBackend.engine(mEngine).load(file(), mSettings);
    config.require(*mSession);
    char const* name{nullptr};
    check(TRITONBACKEND_ModelName(model, &name));
    mMetrics = std::make_unique<metrics::Metrics>(backend.families, name, std::to_string(version));
}

void Model::addRunner()
{
    int32_t const before = mMade++;
    if (mMost != 0 && before >= mMost)
    {
        return;
    }
    Session* session = mSession.get();
    if (before > 0 && !session->shared())
    {
        auto further = mBackend.engine(mEngine).load(file(), mSettings);
        session = further.get();
        std::lock_guard<std::mutex> const lock(mMutex);
        mFurther.push_back(std::move(further));
    }
    auto runner = session->runner();
    warm(*runner);
    mRunners.add(std::move(runner));
}

//! model.onnx, as it was published. The bytes that were compared are the ones that are loaded, even if the file is
//! written to meanwhile.
std::string Model::file() const
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

void Model::warm(Runner& runner) const
{
    std::vector<Scratch> scratch(inputs().size() + outputs().size());
    std::vector<void*> given;
    std::vector<Wanted> wanted;
    for (size_t i = 0; i < inputs().size(); ++i)
    {
        given.push_back(scratch[i].atLeast(inputs()[i].bytes()));
        std::memset(given.back(), 0, inputs()[i].bytes());
    }
    for (size_t i = 0; i < outputs().size(); ++i)
    {
        wanted.push_back({i, scratch[inputs().size() + i].atLeast(outputs()[i].bytes())});
    }
    runner.run(1, given, wanted);
}
