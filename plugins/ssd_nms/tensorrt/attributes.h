//! \file attributes.h
//! The attributes of the SSDNMS node: names, types and defaults, read from TensorRT's fields and written to them.

#ifndef SSD_NMS_TENSORRT_ATTRIBUTES_H
#define SSD_NMS_TENSORRT_ATTRIBUTES_H

#include "../ssd_nms.h"
#include "logging.h"

#include <NvInfer.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

constexpr char kName[] = "SSDNMS";
constexpr char kVersion[] = "1";
//! Of what a plan holds; a plan of another version is refused.
constexpr int32_t kSerializationVersion = 2;

constexpr char const* kActivations[] = {"softmax", "sigmoid", "none"};
constexpr char const* kCodings[] = {"center_size", "corner"};

void check(SsdNmsParams const& params, SsdNmsShape const* shape)
{
    char message[256];
    if (ssdNmsValidate(&params, shape, message, sizeof(message)) != SSD_NMS_OK)
    {
        throw std::invalid_argument{message};
    }
}

SsdNmsParams defaultParams()
{
    return SsdNmsParams{0.05F, 0.45F, 100, 0, 0, SSD_NMS_SOFTMAX, SSD_NMS_CENTER_SIZE, {10.F, 10.F, 5.F, 5.F}, 1, 0,
        0.01F};
}

std::string quoted(std::string const& text)
{
    return "'" + text + "'";
}

std::string nameOf(PluginFieldType type)
{
    switch (type)
    {
    case PluginFieldType::kFLOAT32:
        return "FP32";
    case PluginFieldType::kINT32:
        return "INT32";
    case PluginFieldType::kCHAR:
        return "CHAR";
    default:
        return "PluginFieldType " + std::to_string(static_cast<int32_t>(type));
    }
}

void requireField(bool passed, PluginField const& field, std::string const& wanted)
{
    if (!passed)
    {
        throw std::invalid_argument{"attribute " + std::string{field.name} + " must be " + wanted + ", got "
            + std::to_string(field.length) + " of type " + nameOf(field.type)};
    }
}

float floatOf(PluginField const& field, int32_t index = 0)
{
    return static_cast<float const*>(field.data)[index];
}

float oneFloat(PluginField const& field)
{
    requireField(field.type == PluginFieldType::kFLOAT32 && field.length == 1, field, "1 float");
    return floatOf(field);
}

int32_t oneInt(PluginField const& field)
{
#if NV_TENSORRT_MAJOR >= 10
    if (field.type == PluginFieldType::kINT64 && field.length == 1)
    {
        int64_t const value = *static_cast<int64_t const*>(field.data);
        if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
        {
            throw std::invalid_argument{
                "attribute " + std::string{field.name} + " is " + std::to_string(value) + ", must fit 32 bits"};
        }
        return static_cast<int32_t>(value);
    }
#endif
    requireField(field.type == PluginFieldType::kINT32 && field.length == 1, field, "1 integer");
    return *static_cast<int32_t const*>(field.data);
}

template <size_t kCount>
int32_t oneOf(PluginField const& field, char const* const (&choices)[kCount])
{
    requireField(field.type == PluginFieldType::kCHAR && field.length >= 0, field, "a string");
    auto const* const text = static_cast<char const*>(field.data);
    std::string const value{text, strnlen(text, static_cast<size_t>(field.length))};
    std::string allowed;
    for (size_t i = 0; i < kCount; ++i)
    {
        if (value == choices[i])
        {
            return static_cast<int32_t>(i);
        }
        allowed += (i == 0 ? "" : ", ") + quoted(choices[i]);
    }
    throw std::invalid_argument{
        "attribute " + std::string{field.name} + " is " + quoted(value) + ", must be one of " + allowed};
}

//! The attributes as TensorRT's ONNX parser reads their names and types from the creator, and as a plan holds them.
//! The pointers are to the parameters given, which must outlive the result.
std::vector<PluginField> fieldsOf(SsdNmsParams const& p)
{
    auto const text = [](char const* name, char const* value)
    {
        return PluginField{name, value, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(value))};
    };
    auto const real = [](char const* name, float const* value, int32_t count)
    {
        return PluginField{name, value, PluginFieldType::kFLOAT32, count};
    };
    auto const whole = [](char const* name, int32_t const* value)
    {
        return PluginField{name, value, PluginFieldType::kINT32, 1};
    };
    return {
        real("score_threshold", &p.scoreThreshold, 1),
        real("iou_threshold", &p.iouThreshold, 1),
        whole("max_detections", &p.maxDetections),
        whole("topk_per_class", &p.topkPerClass),
        whole("background_class", &p.backgroundClass),
        text("score_activation", kActivations[p.scoreActivation]),
        text("box_coding", kCodings[p.boxCoding]),
        real("box_scales", p.boxScales, 4),
        whole("clip_boxes", &p.clipBoxes),
        whole("class_agnostic", &p.classAgnostic),
        real("lowest_score_threshold", &p.lowestScoreThreshold, 1),
    };
}

constexpr char kSerializationVersionField[] = "serialization_version";
constexpr char kInputsField[] = "inputs";
constexpr char kWorkspaceField[] = "workspace_bytes";

//! What a plan's fields hold beside the attributes and the version.
struct PlanFields
{
    int32_t inputs;
    int64_t workspace;
};

void checkSerializationVersion(int32_t version)
{
    if (version != kSerializationVersion)
    {
        throw std::invalid_argument{"the plan holds SSDNMS in serialization version " + std::to_string(version)
            + ", this library reads " + std::to_string(kSerializationVersion)
            + ": build the plan again, or load the library it was built with"};
    }
}

//! \param plan receives what a plan holds beside the attributes; null: the fields come from a network.
SsdNmsParams paramsFrom(PluginFieldCollection const* fields, PlanFields* plan = nullptr)
{
    SsdNmsParams p = defaultParams();
    bool hasVersion = false;
    bool hasInputs = false;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i)
    {
        PluginField const& field = fields->fields[i];
        if (field.name == nullptr || field.data == nullptr)
        {
            throw std::invalid_argument{"an attribute without a name or without data"};
        }
        std::string const name = field.name;
        if (name == "score_threshold")
        {
            p.scoreThreshold = oneFloat(field);
        }
        else if (name == "iou_threshold")
        {
            p.iouThreshold = oneFloat(field);
        }
        else if (name == "max_detections")
        {
            p.maxDetections = oneInt(field);
        }
        else if (name == "topk_per_class")
        {
            p.topkPerClass = oneInt(field);
        }
        else if (name == "background_class")
        {
            p.backgroundClass = oneInt(field);
        }
        else if (name == "score_activation")
        {
            p.scoreActivation = oneOf(field, kActivations);
        }
        else if (name == "box_coding")
        {
            p.boxCoding = oneOf(field, kCodings);
        }
        else if (name == "box_scales")
        {
            requireField(field.type == PluginFieldType::kFLOAT32 && field.length == 4, field, "4 floats");
            for (int32_t k = 0; k < 4; ++k)
            {
                p.boxScales[k] = floatOf(field, k);
            }
        }
        else if (name == "clip_boxes")
        {
            p.clipBoxes = oneInt(field);
        }
        else if (name == "class_agnostic")
        {
            p.classAgnostic = oneInt(field);
        }
        else if (name == "lowest_score_threshold")
        {
            p.lowestScoreThreshold = oneFloat(field);
        }
        else if (plan != nullptr && name == kSerializationVersionField)
        {
            checkSerializationVersion(oneInt(field));
            hasVersion = true;
        }
        else if (plan != nullptr && name == kInputsField)
        {
            plan->inputs = oneInt(field);
            hasInputs = true;
        }
#if NV_TENSORRT_MAJOR >= 10
        else if (plan != nullptr && name == kWorkspaceField)
        {
            requireField(field.type == PluginFieldType::kINT64 && field.length == 1, field, "1 integer of 64 bits");
            plan->workspace = *static_cast<int64_t const*>(field.data);
        }
#endif
        else
        {
            std::string known;
            for (PluginField const& each : fieldsOf(p))
            {
                known += (known.empty() ? "" : ", ") + std::string{each.name};
            }
            throw std::invalid_argument{"unknown attribute " + quoted(name) + "; known: " + known};
        }
    }
    if (plan != nullptr && !hasVersion)
    {
        throw std::invalid_argument{"the plan's SSDNMS has no serialization version"};
    }
    if (plan != nullptr && !hasInputs)
    {
        throw std::invalid_argument{"the plan's SSDNMS does not say how many inputs it has"};
    }
    check(p, nullptr);
    return p;
}

//! The fields that a creator announces, with the defaults as their values.
PluginFieldCollection const* announcedFields()
{
    static SsdNmsParams const kDefaults = defaultParams();
    static std::vector<PluginField> const kFields = fieldsOf(kDefaults);
    static PluginFieldCollection const kCollection{static_cast<int32_t>(kFields.size()), kFields.data()};
    return &kCollection;
}

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_TENSORRT_ATTRIBUTES_H
