//! \file model.h
//! What the instances of a model have in common, and what all models have.

#ifndef SSD_MODEL_H
#define SSD_MODEL_H

#include "engine.h"
#include "errors.h"
#include "metrics.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <thread>

//! The engines, each loaded when a model first asks for it, and the families of metrics.
class Backend
{
public:
    //! \throw Refused where there is no such engine, or its library cannot be loaded.
    Engine const& engine(std::string const& name);

    metrics::Families const families;

private:
    std::mutex mMutex;
    std::map<std::string, std::unique_ptr<Engine>> mEngines;
};

//! The runners of a model, each with a thread of its own: as many requests run at once, in the order in which they came.
//! A runner takes the next request as soon as it is done with one, without a thread that has to wake up in between, and
//! however many instances wait, the threads that compute stay the same: they keep their cores, caches and memory.
class Runners
{
public:
    Runners() = default;
    ~Runners();

    Runners(Runners const&) = delete;
    Runners& operator=(Runners const&) = delete;

    //! \throw std::system_error where there can be no further thread.
    void add(std::unique_ptr<Runner> runner);

    //! Has a runner do something, in its thread.
    //! \throw What that throws.
    void run(std::function<void(Runner&)> work);

private:
    void serve(Runner& runner);

    std::mutex mMutex;
    std::condition_variable mChanged;
    std::deque<std::packaged_task<void(Runner&)>> mWaiting;
    std::vector<std::unique_ptr<Runner>> mRunners;
    std::vector<std::thread> mThreads;
    bool mEnding{false};
};

class Model
{
public:
    //! \throw Refused, std::runtime_error where the model cannot be served as configured.
    Model(Backend& backend, TRITONBACKEND_Model* model);

    Model(Model const&) = delete;
    Model& operator=(Model const&) = delete;

    //! Makes another runner, which answers a blank picture first, unless there are as many as may run at once. What
    //! cannot run does not load, and the first client does not pay for first allocations.
    void addRunner();

    metrics::Metrics const& metrics() const noexcept
    {
        return *mMetrics;
    }

    Runners& runners() noexcept
    {
        return mRunners;
    }

    std::vector<Tensor> const& inputs() const noexcept
    {
        return mSession->inputs;
    }

    std::vector<Tensor> const& outputs() const noexcept
    {
        return mSession->outputs;
    }

private:
    std::string file() const;
    void warm(Runner& runner) const;

    Backend& mBackend;
    std::string mPath;
    std::string mDigest; //!< of model.onnx; empty = not known
    std::string mEngine;
    Settings mSettings;
    std::unique_ptr<metrics::Metrics> mMetrics;
    int32_t mMost{0}; //!< Runners at once; 0 = one for each instance.
    std::unique_ptr<Session> mSession;
    std::mutex mMutex; //!< Instances are made in parallel.
    std::vector<std::unique_ptr<Session>>
        mFurther; //!< Sessions of the second runner and the next, where none is shared.
    Runners mRunners; //!< Gone before their sessions.
    std::atomic<int32_t> mMade{0};
};

#endif // SSD_MODEL_H
