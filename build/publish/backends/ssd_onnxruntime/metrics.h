//! \file metrics.h
//! This backend's own metrics. Triton's page of metrics shows them beside Triton's own; docs/fleet.md lists them.
//!
//! No metric is a reason to fail: where the server has none, nothing is counted. A series is gone from the page when
//! its Metrics object is, which is when the version is unloaded.

#ifndef SSD_METRICS_H
#define SSD_METRICS_H

#include "triton.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace metrics
{
//! Whether it worked; what Triton says else is dropped.
inline bool worked(TRITONSERVER_Error* error) noexcept
{
    if (error != nullptr)
    {
        TRITONSERVER_ErrorDelete(error);
    }
    return error == nullptr;
}

struct Deleter
{
    void operator()(TRITONSERVER_MetricFamily* family) const noexcept
    {
        worked(TRITONSERVER_MetricFamilyDelete(family));
    }

    void operator()(TRITONSERVER_Metric* metric) const noexcept
    {
        worked(TRITONSERVER_MetricDelete(metric));
    }

    void operator()(TRITONSERVER_MetricArgs* arguments) const noexcept
    {
        worked(TRITONSERVER_MetricArgsDelete(arguments));
    }

    void operator()(TRITONSERVER_Parameter* label) const noexcept
    {
        TRITONSERVER_ParameterDelete(label);
    }
};

using Family = std::unique_ptr<TRITONSERVER_MetricFamily, Deleter>; //!< Must outlive its metrics.
using Metric = std::unique_ptr<TRITONSERVER_Metric, Deleter>;
using Labels = std::vector<std::pair<std::string, std::string>>; //!< name, value

//! Null where the server has no metrics.
inline Family makeFamily(TRITONSERVER_MetricKind kind, std::string const& name, std::string const& help)
{
    TRITONSERVER_MetricFamily* family{nullptr};
    return Family(worked(TRITONSERVER_MetricFamilyNew(&family, kind, name.c_str(), help.c_str())) ? family : nullptr);
}

//! \param bounds Upper bounds of the buckets of a histogram; empty for a counter.
inline Metric makeMetric(Family const& family, Labels const& labels, std::vector<double> const& bounds = {})
{
    if (family == nullptr)
    {
        return nullptr;
    }
    std::vector<std::unique_ptr<TRITONSERVER_Parameter, Deleter>> owned;
    std::vector<TRITONSERVER_Parameter const*> given;
    for (auto const& [name, value] : labels)
    {
        owned.emplace_back(TRITONSERVER_ParameterNew(name.c_str(), TRITONSERVER_PARAMETER_STRING, value.c_str()));
        given.push_back(owned.back().get());
    }
    TRITONSERVER_Metric* metric{nullptr};
    if (bounds.empty())
    {
        return Metric(
            worked(TRITONSERVER_MetricNew(&metric, family.get(), given.data(), given.size())) ? metric : nullptr);
    }
    TRITONSERVER_MetricArgs* raw{nullptr};
    if (!worked(TRITONSERVER_MetricArgsNew(&raw)))
    {
        return nullptr;
    }
    std::unique_ptr<TRITONSERVER_MetricArgs, Deleter> const arguments(raw);
    bool const made = worked(TRITONSERVER_MetricArgsSetHistogram(raw, bounds.data(), bounds.size()))
        && worked(TRITONSERVER_MetricNewWithArgs(&metric, family.get(), given.data(), given.size(), raw));
    return Metric(made ? metric : nullptr);
}

inline void add(Metric const& metric, double value) noexcept
{
    if (metric != nullptr)
    {
        worked(TRITONSERVER_MetricIncrement(metric.get(), value));
    }
}

//! The families of a histogram: one of Triton's own, or three of counters in an older server without histograms.
//! Prometheus reads the same series from both.
struct HistogramFamily
{
    HistogramFamily(std::string const& name, std::string const& help, std::vector<double> const& bounds)
        : bounds(bounds)
    {
        if (TRITONSERVER_MetricObserve != nullptr)
        {
            own = makeFamily(TRITONSERVER_METRIC_KIND_HISTOGRAM, name, help);
            return;
        }
        buckets = makeFamily(TRITONSERVER_METRIC_KIND_COUNTER, name + "_bucket", help);
        sum = makeFamily(TRITONSERVER_METRIC_KIND_COUNTER, name + "_sum", help);
        count = makeFamily(TRITONSERVER_METRIC_KIND_COUNTER, name + "_count", help);
    }

    std::vector<double> bounds;
    Family own;
    Family buckets;
    Family sum;
    Family count;
};

//! A histogram's series with some labels.
class Histogram
{
public:
    Histogram(HistogramFamily const& family, Labels const& labels)
        : mBounds(family.bounds)
        , mSum(makeMetric(family.sum, labels))
        , mCount(makeMetric(family.count, labels))
    {
        if (family.own != nullptr)
        {
            mOwn = makeMetric(family.own, labels, mBounds);
        }
        for (size_t i = 0; family.buckets != nullptr && i <= mBounds.size(); ++i)
        {
            std::ostringstream bound;
            i < mBounds.size() ? bound << mBounds[i] : bound << "+Inf";
            Labels all = labels;
            all.emplace_back("le", bound.str());
            mBuckets.push_back(makeMetric(family.buckets, all));
        }
    }

    //! \param value Not below 0.
    void observe(double value) const noexcept
    {
        if (mOwn != nullptr)
        {
            worked(TRITONSERVER_MetricObserve(mOwn.get(), value));
        }
        for (size_t i = 0; i < mBuckets.size(); ++i) // each bucket holds those below it, too
        {
            if (i == mBounds.size() || value <= mBounds[i])
            {
                add(mBuckets[i], 1);
            }
        }
        add(mSum, value);
        add(mCount, 1);
    }

private:
    std::vector<double> mBounds;
    Metric mOwn;
    std::vector<Metric> mBuckets;
    Metric mSum;
    Metric mCount;
};

//! The families of all metrics, of which a server has one each.
struct Families
{
    Family clientErrors = makeFamily(TRITONSERVER_METRIC_KIND_COUNTER, "ssd_client_errors",
        "Requests that were answered as invalid: their client's fault, and no failure of the model");
    HistogramFamily execution{"ssd_execution_seconds",
        "Seconds from the moment an instance takes a request to its answer, of answered requests; without the queue",
        {0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1,
            2, 5, 10}};
    HistogramFamily detections{"ssd_detections_per_image",
        "Detections of an image at the thresholds of its request; requests that do not ask for num_detections are left "
        "out",
        {0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000}};
};

//! The metrics of one version of a model. Several threads may count at once.
class Metrics
{
public:
    Metrics(Families const& families, std::string const& model, std::string const& version)
        : mClientErrors(makeMetric(families.clientErrors, {{"model", model}, {"version", version}}))
        , mExecution(families.execution, {{"model", model}, {"version", version}})
        , mDetections(families.detections, {{"model", model}, {"version", version}})
    {
    }

    //! Counts a request that its client got wrong.
    void countClientError() const noexcept
    {
        add(mClientErrors, 1);
    }

    //! Counts an answered request.
    void countExecution(uint64_t nanoseconds) const noexcept
    {
        mExecution.observe(static_cast<double>(nanoseconds) * 1e-9);
    }

    //! \param counts The detections of each of `images` images.
    void countDetections(int32_t const* counts, size_t images) const noexcept
    {
        for (size_t i = 0; i < images; ++i)
        {
            mDetections.observe(static_cast<double>(counts[i]));
        }
    }

private:
    Metric mClientErrors;
    Histogram mExecution;
    Histogram mDetections;
};
} // namespace metrics

#endif // SSD_METRICS_H
