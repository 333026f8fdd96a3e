//! \file checks.cpp
//! Validation and status texts: the part of ssd_nms.h that both implementations share.

#include "checks.h"

#include <cstdarg>
#include <cstdio>

namespace
{

//! Writes the message of the first check that fails.
class Checker
{
public:
    Checker(char* message, size_t messageSize)
        : mMessage{message}
        , mMessageSize{messageSize}
    {
        if (mMessage != nullptr && mMessageSize > 0)
        {
            mMessage[0] = '\0';
        }
    }

    //! \return whether the check passed.
    bool operator()(bool passed, SsdNmsStatus failure, char const* format, ...) __attribute__((format(printf, 4, 5)))
    {
        if (!passed)
        {
            mStatus = failure;
            if (mMessage != nullptr && mMessageSize > 0)
            {
                va_list arguments;
                va_start(arguments, format);
                std::vsnprintf(mMessage, mMessageSize, format, arguments);
                va_end(arguments);
            }
        }
        return passed;
    }

    SsdNmsStatus status() const
    {
        return mStatus;
    }

private:
    char* mMessage;
    size_t mMessageSize;
    SsdNmsStatus mStatus{SSD_NMS_OK};
};

bool checkParams(Checker& check, SsdNmsParams const& p)
{
    constexpr auto kInvalid = SSD_NMS_INVALID_PARAMS;
    auto const isFraction = [](float value)
    {
        return value >= 0.0F && value <= 1.0F;
    };
    auto const isFlag = [](int32_t value)
    {
        return value == 0 || value == 1;
    };
    bool passed =
        check(isFraction(p.scoreThreshold), kInvalid, "score_threshold is %g, must be in [0, 1]", p.scoreThreshold)
        && check(isFraction(p.iouThreshold), kInvalid, "iou_threshold is %g, must be in [0, 1]", p.iouThreshold)
        && check(p.maxDetections >= 1, kInvalid, "max_detections is %d, must be at least 1", p.maxDetections)
        && check(p.topkPerClass >= 0, kInvalid, "topk_per_class is %d, must be at least 0 (0: no cap)", p.topkPerClass)
        && check(p.backgroundClass >= -1, kInvalid, "background_class is %d, must be -1 (none) or a class",
            p.backgroundClass)
        && check(p.scoreActivation >= SSD_NMS_SOFTMAX && p.scoreActivation <= SSD_NMS_NONE, kInvalid,
            "score_activation is %d, must be 0 (softmax), 1 (sigmoid) or 2 (none)", p.scoreActivation)
        && check(p.boxCoding == SSD_NMS_CENTER_SIZE || p.boxCoding == SSD_NMS_CORNER, kInvalid,
            "box_coding is %d, must be 0 (center_size) or 1 (corner)", p.boxCoding)
        && check(isFlag(p.clipBoxes), kInvalid, "clip_boxes is %d, must be 0 or 1", p.clipBoxes)
        && check(isFlag(p.classAgnostic), kInvalid, "class_agnostic is %d, must be 0 or 1", p.classAgnostic)
        && check(isFraction(p.lowestScoreThreshold), kInvalid, "lowest_score_threshold is %g, must be in [0, 1]",
            p.lowestScoreThreshold);
    for (int32_t i = 0; passed && i < 4; ++i)
    {
        float const scale = p.boxScales[i];
        passed = check(scale > 0.0F && scale <= 3.402823466e38F, kInvalid,
            "box_scales[%d] is %g, must be above 0 and finite", i, scale);
    }
    return passed;
}

bool checkShape(Checker& check, SsdNmsParams const& p, SsdNmsShape const& s)
{
    constexpr auto kInvalid = SSD_NMS_INVALID_SHAPE;
    auto const isType = [](int32_t type)
    {
        return type == SSD_NMS_FLOAT32 || type == SSD_NMS_FLOAT16;
    };
    if (!(check(s.batch >= 1, kInvalid, "the batch is %d, must be at least 1", s.batch)
            && check(s.anchors >= 1, kInvalid, "there are %d anchors, must be at least 1", s.anchors)
            && check(s.classes >= 1, kInvalid, "there are %d classes, must be at least 1", s.classes)
            && check(isType(s.deltasType), kInvalid, "the type of box_deltas is %d, must be 0 (FP32) or 1 (FP16)",
                s.deltasType)
            && check(isType(s.logitsType), kInvalid, "the type of class_logits is %d, must be 0 (FP32) or 1 (FP16)",
                s.logitsType)
            && check(p.backgroundClass < s.classes, SSD_NMS_INVALID_PARAMS,
                "background_class is %d, must be below the number of classes, %d", p.backgroundClass, s.classes)))
    {
        return false;
    }
    int32_t const foreground = ssd_nms::foregroundClasses(p, s);
    if (!check(foreground >= 1, kInvalid, "there is 1 class and it is the background: nothing could be detected"))
    {
        return false;
    }
    auto const candidates = static_cast<unsigned long long>(s.anchors) * static_cast<unsigned long long>(foreground);
    auto const rows = static_cast<unsigned long long>(s.anchors) * static_cast<unsigned long long>(s.batch);
    return check(candidates <= 0xFFFFFFFFULL, SSD_NMS_TOO_LARGE,
               "%d anchors x %d foreground classes = %llu candidates per image, must be at most 4294967295", s.anchors,
               foreground, candidates)
        && check(rows <= 0x7FFFFFFFULL, SSD_NMS_TOO_LARGE, "batch %d x %d anchors = %llu, must be at most 2147483647",
            s.batch, s.anchors, rows);
}

} // namespace

namespace ssd_nms
{

SsdNmsStatus checkCall(SsdNmsParams const* params, SsdNmsShape const* shape, SsdNmsTensors const* tensors)
{
    if (params == nullptr || shape == nullptr || tensors == nullptr)
    {
        return SSD_NMS_INVALID_POINTER;
    }
    SsdNmsStatus const status = ssdNmsValidate(params, shape, nullptr, 0);
    if (status != SSD_NMS_OK)
    {
        return status;
    }
    auto const isValid = [](void const* pointer)
    {
        return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    };
    SsdNmsTensors const& t = *tensors;
    bool const areValid = isValid(t.boxDeltas) && isValid(t.classLogits) && isValid(t.anchors)
        && (!shape->hasScoreThresholds || isValid(t.scoreThresholds))
        && (!shape->hasIouThresholds || isValid(t.iouThresholds)) && isValid(t.numDetections) && isValid(t.boxes)
        && isValid(t.scores) && isValid(t.labels);
    return areValid ? SSD_NMS_OK : SSD_NMS_INVALID_POINTER;
}

} // namespace ssd_nms

char const* ssdNmsStatusString(SsdNmsStatus status)
{
    switch (status)
    {
    case SSD_NMS_OK:
        return "ok";
    case SSD_NMS_INVALID_PARAMS:
        return "a parameter is out of its range (ssdNmsValidate says which)";
    case SSD_NMS_INVALID_SHAPE:
        return "a dimension or type is out of its range (ssdNmsValidate says which)";
    case SSD_NMS_TOO_LARGE:
        return "the problem is larger than the index that orders candidates";
    case SSD_NMS_INVALID_POINTER:
        return "a pointer is null or not aligned to 16 bytes";
    case SSD_NMS_WORKSPACE_TOO_SMALL:
        return "the workspace is smaller than ssdNmsWorkspaceSize() asks for";
    case SSD_NMS_LAUNCH_FAILED:
        return "CUDA refused a kernel launch (ssdNmsLastError says why)";
    }
    return "unknown status";
}

SsdNmsStatus ssdNmsValidate(SsdNmsParams const* params, SsdNmsShape const* shape, char* message, size_t messageSize)
{
    Checker check{message, messageSize};
    if (check(params != nullptr, SSD_NMS_INVALID_POINTER, "params must not be null") && checkParams(check, *params)
        && shape != nullptr)
    {
        checkShape(check, *params, *shape);
    }
    return check.status();
}
