//! \file reference.cpp
//! SSDNMS on the CPU, step by step as docs/design.md tells it: what the kernels are compared with, bit for bit.
//!
//! Written to be read, not to be fast: every candidate is sorted, every pair of a class is looked at.

#include "../checks.h"
#include "../numerics.h"

#include <algorithm>
#include <exception>
#include <vector>

namespace
{

using namespace ssd_nms;

struct Candidate
{
    Key key;
    int32_t label;
    int32_t anchor;
    Box box;
};

bool isBetter(Candidate const& a, Candidate const& b)
{
    return a.key.value > b.key.value;
}

float load(void const* tensor, int32_t type, int64_t index)
{
    return type == SSD_NMS_FLOAT16 ? toFloat(static_cast<Half const*>(tensor)[index])
                                   : static_cast<float const*>(tensor)[index];
}

//! Step 1, for one anchor.
std::vector<float> activate(std::vector<float> values, int32_t activation)
{
    if (activation == SSD_NMS_SIGMOID)
    {
        std::transform(values.begin(), values.end(), values.begin(), sigmoidOf);
    }
    else if (activation == SSD_NMS_SOFTMAX)
    {
        float most = -INFINITY;
        for (float const value : values)
        {
            most = fmaxf(most, value);
        }
        float sums[kLanesPerAnchor] = {};
        for (size_t c = 0; c < values.size(); ++c)
        {
            values[c] = expOf(values[c] - most);
            sums[c % kLanesPerAnchor] += values[c];
        }
        for (int32_t step = kLanesPerAnchor / 2; step > 0; step /= 2)
        {
            for (int32_t lane = 0; lane < step; ++lane)
            {
                sums[lane] += sums[lane + step];
            }
        }
        for (float& value : values)
        {
            value /= sums[0];
        }
    }
    return values;
}

//! Steps 1 and 2, for one row: all candidates, with their boxes.
std::vector<Candidate> findCandidates(
    SsdNmsParams const& params, SsdNmsShape const& shape, SsdNmsTensors const& tensors, int32_t row)
{
    float const asked = shape.hasScoreThresholds ? tensors.scoreThresholds[row] : params.scoreThreshold;
    float const threshold = effectiveThreshold(asked, params.lowestScoreThreshold);
    std::vector<Candidate> candidates;
    std::vector<float> logits(static_cast<size_t>(shape.classes));
    for (int32_t anchor = 0; anchor < shape.anchors; ++anchor)
    {
        int64_t const index = static_cast<int64_t>(row) * shape.anchors + anchor;
        for (int32_t c = 0; c < shape.classes; ++c)
        {
            logits[static_cast<size_t>(c)] = load(tensors.classLogits, shape.logitsType, index * shape.classes + c);
        }
        float deltas[4];
        for (int32_t i = 0; i < 4; ++i)
        {
            deltas[i] = load(tensors.boxDeltas, shape.deltasType, index * 4 + i);
        }
        Box const box = decode(deltas, tensors.anchors + static_cast<int64_t>(anchor) * 4, params);
        std::vector<float> const scores = activate(logits, params.scoreActivation);
        for (int32_t c = 0; c < shape.classes; ++c)
        {
            float const score = scores[static_cast<size_t>(c)];
            if (c != params.backgroundClass && score > threshold)
            {
                int32_t const label = c - (params.backgroundClass >= 0 && c > params.backgroundClass ? 1 : 0);
                candidates.push_back({makeKey(score, label, anchor, shape.anchors), label, anchor, box});
            }
        }
    }
    return candidates;
}

//! Step 4, for one group of candidates, best first. Only the best \p most of a group can be among those of all groups.
std::vector<Candidate> suppress(std::vector<Candidate> const& candidates, float iouThreshold, size_t most)
{
    std::vector<Candidate> kept;
    for (Candidate const& candidate : candidates)
    {
        if (kept.size() == most)
        {
            break;
        }
        bool const isSuppressed = std::any_of(kept.begin(), kept.end(), [&](Candidate const& better)
            { return overlaps(better.box, areaOf(better.box), candidate.box, areaOf(candidate.box), iouThreshold); });
        if (!isSuppressed)
        {
            kept.push_back(candidate);
        }
    }
    return kept;
}

void detect(SsdNmsParams const& params, SsdNmsShape const& shape, SsdNmsTensors const& tensors, int32_t row)
{
    std::vector<std::vector<Candidate>> classes(static_cast<size_t>(foregroundClasses(params, shape)));
    for (Candidate const& candidate : findCandidates(params, shape, tensors, row))
    {
        classes[static_cast<size_t>(candidate.label)].push_back(candidate);
    }
    for (std::vector<Candidate>& candidates : classes) // step 3
    {
        std::sort(candidates.begin(), candidates.end(), isBetter);
        if (params.topkPerClass > 0 && candidates.size() > static_cast<size_t>(params.topkPerClass))
        {
            candidates.resize(static_cast<size_t>(params.topkPerClass));
        }
    }
    if (params.classAgnostic)
    {
        std::vector<Candidate> all;
        for (std::vector<Candidate> const& candidates : classes)
        {
            all.insert(all.end(), candidates.begin(), candidates.end());
        }
        std::sort(all.begin(), all.end(), isBetter);
        classes.assign(1, all);
    }
    auto const most = static_cast<size_t>(params.maxDetections);
    float const iouThreshold = shape.hasIouThresholds ? tensors.iouThresholds[row] : params.iouThreshold;
    std::vector<Candidate> kept;
    for (std::vector<Candidate> const& candidates : classes)
    {
        std::vector<Candidate> const winners = suppress(candidates, iouThreshold, most);
        kept.insert(kept.end(), winners.begin(), winners.end());
    }
    std::sort(kept.begin(), kept.end(), isBetter); // step 5

    auto const count = std::min(kept.size(), most);
    auto const first = static_cast<size_t>(row) * most;
    tensors.numDetections[row] = static_cast<int32_t>(count);
    for (size_t i = 0; i < most; ++i)
    {
        bool const isReal = i < count;
        Box const box = isReal ? kept[i].box : Box{};
        std::memcpy(tensors.boxes + (first + i) * 4, &box, sizeof(box));
        tensors.scores[first + i] = isReal ? scoreOf(kept[i].key) : 0.0F;
        tensors.labels[first + i] = isReal ? kept[i].label : -1;
    }
}

} // namespace

size_t ssdNmsWorkspaceSize(SsdNmsParams const* /* params */, SsdNmsShape const* /* shape */)
{
    return 0;
}

SsdNmsStatus ssdNmsLaunch(SsdNmsParams const* params, SsdNmsShape const* shape, SsdNmsTensors const* tensors,
    void* /* workspace */, size_t /* workspaceSize */, void* /* stream */)
{
    SsdNmsStatus const status = checkCall(params, shape, tensors);
    if (status != SSD_NMS_OK)
    {
        return status;
    }
    try
    {
        for (int32_t row = 0; row < shape->batch; ++row)
        {
            detect(*params, *shape, *tensors, row);
        }
    }
    catch (std::exception const&) // no memory
    {
        return SSD_NMS_LAUNCH_FAILED;
    }
    return SSD_NMS_OK;
}

char const* ssdNmsLastError()
{
    return ""; // nothing is launched
}
