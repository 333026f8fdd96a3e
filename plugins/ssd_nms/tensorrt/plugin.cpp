//! \file plugin.cpp
//! SSDNMS as a TensorRT plugin: IPluginV3 where TensorRT has it (10 and later), IPluginV2DynamicExt for 8.6.
//!
//! Both adapters are thin: attributes, formats, shapes and messages are shared, the work is ssd_nms.h's.

#include "../ssd_nms.h"

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#define SSD_NMS_TEXT_OF(value) #value
#define SSD_NMS_TEXT(value) SSD_NMS_TEXT_OF(value)

//! What this library is: a line of JSON behind a marker, so that tools find it in the file without loading it, too.
//! \return the JSON; the memory belongs to the library.
extern "C" SSD_NMS_API char const* ssdNmsPluginInfo() noexcept;

char const* ssdNmsPluginInfo() noexcept
{
    static constexpr char kMarker[] = "SSD_NMS_PLUGIN_INFO:";
    static constexpr char kInfo[] =
        "SSD_NMS_PLUGIN_INFO:{\"plugin\": \"SSDNMS\", \"plugin_version\": \"1\", \"version\": \"" SSD_NMS_VERSION
        "\", \"tensorrt\": \"" SSD_NMS_TEXT(NV_TENSORRT_MAJOR) "." SSD_NMS_TEXT(NV_TENSORRT_MINOR) "." SSD_NMS_TEXT(
            NV_TENSORRT_PATCH) "\", \"cuda\": \"" SSD_NMS_CUDA_VERSION "\", \"architectures\": \"" SSD_NMS_ARCHITECTURES
                               "\", \"git\": \"" SSD_NMS_GIT "\"}";
    return kInfo + sizeof(kMarker) - 1;
}

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

constexpr char kName[] = "SSDNMS";
constexpr char kVersion[] = "1";
constexpr int32_t kOutputs = 4;
constexpr int32_t kFewestInputs = 3;
constexpr int32_t kMostInputs = 5;
//! Of what a plan holds; a plan of another version is refused.
constexpr int32_t kSerializationVersion = 1;

enum Input : int32_t
{
    kBOX_DELTAS = 0,
    kCLASS_LOGITS = 1,
    kANCHORS = 2,
    kSCORE_THRESHOLD = 3,
    kIOU_THRESHOLD = 4,
};

enum Output : int32_t
{
    kNUM_DETECTIONS = 0,
    kDETECTION_BOXES = 1,
    kDETECTION_SCORES = 2,
    kDETECTION_CLASSES = 3,
};

constexpr DataType kOutputTypes[kOutputs] = {DataType::kINT32, DataType::kFLOAT, DataType::kFLOAT, DataType::kINT32};
constexpr char const* kActivations[] = {"softmax", "sigmoid", "none"};
constexpr char const* kCodings[] = {"center_size", "corner"};

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
    if (ILogger* const logger = getLogger())
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
    return SsdNmsParams{0.05F, 0.45F, 100, 0, 0, SSD_NMS_SOFTMAX, SSD_NMS_CENTER_SIZE, {10.F, 10.F, 5.F, 5.F}, 1, 0};
}

//
// Attributes
//

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
    };
}

constexpr char kSerializationVersionField[] = "serialization_version";

void checkSerializationVersion(int32_t version)
{
    if (version != kSerializationVersion)
    {
        throw std::invalid_argument{"the plan holds SSDNMS in serialization version " + std::to_string(version)
            + ", this library reads " + std::to_string(kSerializationVersion)
            + ": build the plan again, or load the library it was built with"};
    }
}

//! \param isPlan whether the fields come from a plan (then the version must be among them) or from a network.
SsdNmsParams paramsFrom(PluginFieldCollection const* fields, bool isPlan)
{
    SsdNmsParams p = defaultParams();
    bool hasVersion = false;
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
        else if (isPlan && name == kSerializationVersionField)
        {
            checkSerializationVersion(oneInt(field));
            hasVersion = true;
        }
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
    if (isPlan && !hasVersion)
    {
        throw std::invalid_argument{"the plan's SSDNMS has no serialization version"};
    }
    check(p, nullptr);
    return p;
}

//
// Formats and shapes
//

bool isSupported(PluginTensorDesc const& desc, int32_t position, int32_t inputs)
{
    if (desc.format != TensorFormat::kLINEAR)
    {
        return false;
    }
    if (position == kBOX_DELTAS || position == kCLASS_LOGITS)
    {
        return desc.type == DataType::kFLOAT || desc.type == DataType::kHALF;
    }
    return desc.type == (position < inputs ? DataType::kFLOAT : kOutputTypes[position - inputs]);
}

void checkCounts(int32_t inputs, int32_t outputs)
{
    if (inputs < kFewestInputs || inputs > kMostInputs || outputs != kOutputs)
    {
        throw std::invalid_argument{"got " + std::to_string(inputs) + " inputs and " + std::to_string(outputs)
            + " outputs, must be 3 inputs (box_deltas, class_logits, anchors), up to 2 more (score_threshold, "
              "iou_threshold), and 4 outputs"};
    }
}

std::string textOf(Dims const& dims)
{
    std::string text;
    for (int32_t i = 0; i < dims.nbDims; ++i)
    {
        text += (i == 0 ? "[" : ",") + std::to_string(dims.d[i]);
    }
    return text + "]";
}

//! Dimensions that all inputs agree on.
//! \param dims, types one for each input.
SsdNmsShape shapeFrom(std::vector<Dims> const& dims, std::vector<DataType> const& types)
{
    auto const require = [&](bool passed, Input input, char const* name, char const* wanted)
    {
        if (!passed)
        {
            throw std::invalid_argument{std::string{name} + " is " + textOf(dims[static_cast<size_t>(input)])
                + ", must be " + wanted + " (box_deltas " + textOf(dims[kBOX_DELTAS]) + ", class_logits "
                + textOf(dims[kCLASS_LOGITS]) + ")"};
        }
    };
    auto const is = [&](Input input, std::initializer_list<int64_t> wanted)
    {
        Dims const& got = dims[static_cast<size_t>(input)];
        return got.nbDims == static_cast<int32_t>(wanted.size()) && std::equal(wanted.begin(), wanted.end(), got.d);
    };
    Dims const& deltas = dims[kBOX_DELTAS];
    Dims const& logits = dims[kCLASS_LOGITS];
    require(deltas.nbDims == 3 && deltas.d[2] == 4, kBOX_DELTAS, "box_deltas", "[B,N,4]");
    int64_t const batch = deltas.d[0];
    int64_t const anchors = deltas.d[1];
    require(
        logits.nbDims == 3 && logits.d[0] == batch && logits.d[1] == anchors, kCLASS_LOGITS, "class_logits", "[B,N,C]");
    require(is(kANCHORS, {anchors, 4}), kANCHORS, "anchors", "[N,4]");
    if (dims.size() > kSCORE_THRESHOLD)
    {
        require(is(kSCORE_THRESHOLD, {batch, 1}), kSCORE_THRESHOLD, "score_threshold", "[B,1]");
    }
    if (dims.size() > kIOU_THRESHOLD)
    {
        require(is(kIOU_THRESHOLD, {batch, 1}), kIOU_THRESHOLD, "iou_threshold", "[B,1]");
    }
    for (int64_t const value : {batch, anchors, static_cast<int64_t>(logits.d[2])})
    {
        if (value > std::numeric_limits<int32_t>::max())
        {
            throw std::invalid_argument{
                "class_logits is " + textOf(logits) + ", each dimension must be at most 2147483647"};
        }
    }
    auto const typeOf = [&](Input input)
    {
        return types[static_cast<size_t>(input)] == DataType::kHALF ? SSD_NMS_FLOAT16 : SSD_NMS_FLOAT32;
    };
    return SsdNmsShape{static_cast<int32_t>(batch), static_cast<int32_t>(anchors), static_cast<int32_t>(logits.d[2]),
        typeOf(kBOX_DELTAS), typeOf(kCLASS_LOGITS), dims.size() > kSCORE_THRESHOLD ? 1 : 0,
        dims.size() > kIOU_THRESHOLD ? 1 : 0};
}

SsdNmsShape shapeFrom(PluginTensorDesc const* inputs, int32_t count)
{
    checkCounts(count, kOutputs);
    std::vector<Dims> dims;
    std::vector<DataType> types;
    for (int32_t i = 0; i < count; ++i)
    {
        dims.push_back(inputs[i].dims);
        types.push_back(inputs[i].type);
    }
    return shapeFrom(dims, types);
}

//! The largest shape of the optimisation profile.
SsdNmsShape shapeFrom(DynamicPluginTensorDesc const* inputs, int32_t count)
{
    checkCounts(count, kOutputs);
    std::vector<Dims> dims;
    std::vector<DataType> types;
    for (int32_t i = 0; i < count; ++i)
    {
        dims.push_back(inputs[i].max);
        types.push_back(inputs[i].desc.type);
    }
    return shapeFrom(dims, types);
}

DimsExprs outputShape(SsdNmsParams const& params, int32_t output, DimsExprs const* inputs, IExprBuilder& builder)
{
    if (inputs[kBOX_DELTAS].nbDims != 3)
    {
        throw std::invalid_argument{
            "box_deltas has " + std::to_string(inputs[kBOX_DELTAS].nbDims) + " dimensions, must be [B,N,4]"};
    }
    if (inputs[kCLASS_LOGITS].nbDims != 3 || !inputs[kCLASS_LOGITS].d[2]->isConstant())
    {
        throw std::invalid_argument{"class_logits must be [B,N,C] with a C that is not dynamic"};
    }
    DimsExprs shape{};
    shape.nbDims = output == kDETECTION_BOXES ? 3 : 2;
    shape.d[0] = inputs[kBOX_DELTAS].d[0];
    shape.d[1] = builder.constant(output == kNUM_DETECTIONS ? 1 : params.maxDetections);
    if (output == kDETECTION_BOXES)
    {
        shape.d[2] = builder.constant(4);
    }
    return shape;
}

void enqueueOn(SsdNmsParams const& params, PluginTensorDesc const* inputDesc, int32_t inputCount,
    void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream)
{
    SsdNmsShape const shape = shapeFrom(inputDesc, inputCount);
    if (shape.batch == 0)
    {
        return; // TensorRT's empty tensor: there is nothing to write
    }
    check(params, &shape);
    SsdNmsTensors tensors{};
    tensors.boxDeltas = inputs[kBOX_DELTAS];
    tensors.classLogits = inputs[kCLASS_LOGITS];
    tensors.anchors = static_cast<float const*>(inputs[kANCHORS]);
    tensors.scoreThresholds = shape.hasScoreThresholds ? static_cast<float const*>(inputs[kSCORE_THRESHOLD]) : nullptr;
    tensors.iouThresholds = shape.hasIouThresholds ? static_cast<float const*>(inputs[kIOU_THRESHOLD]) : nullptr;
    tensors.numDetections = static_cast<int32_t*>(outputs[kNUM_DETECTIONS]);
    tensors.boxes = static_cast<float*>(outputs[kDETECTION_BOXES]);
    tensors.scores = static_cast<float*>(outputs[kDETECTION_SCORES]);
    tensors.labels = static_cast<int32_t*>(outputs[kDETECTION_CLASSES]);
    // TensorRT gave what getWorkspaceSize() asked for, for the largest shape of the profile.
    SsdNmsStatus const status =
        ssdNmsLaunch(&params, &shape, &tensors, workspace, ssdNmsWorkspaceSize(&params, &shape), stream);
    if (status != SSD_NMS_OK)
    {
        throw std::runtime_error{std::string{"enqueue: "} + ssdNmsStatusString(status)};
    }
}

//! The fields that a creator announces, with the defaults as their values.
PluginFieldCollection const* announcedFields()
{
    static SsdNmsParams const kDefaults = defaultParams();
    static std::vector<PluginField> const kFields = fieldsOf(kDefaults);
    static PluginFieldCollection const kCollection{static_cast<int32_t>(kFields.size()), kFields.data()};
    return &kCollection;
}

#if NV_TENSORRT_MAJOR >= 10

class SsdNmsPlugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    explicit SsdNmsPlugin(SsdNmsParams const& params)
        : mParams{params}
    {
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override
    {
        return guarded<IPluginV3*>(nullptr, [&] { return new SsdNmsPlugin{*this}; });
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return kName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return "";
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
        DynamicPluginTensorDesc const* /* out */, int32_t nbOutputs) noexcept override
    {
        return guarded(-1,
            [&]
            {
                checkCounts(nbInputs, nbOutputs);
                SsdNmsShape const shape = shapeFrom(in, nbInputs);
                check(mParams, &shape);
                return 0;
            });
    }

    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* /* inputTypes */,
        int32_t nbInputs) const noexcept override
    {
        return guarded(-1,
            [&]
            {
                checkCounts(nbInputs, nbOutputs);
                std::copy_n(kOutputTypes, kOutputs, outputTypes);
                return 0;
            });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* /* shapeInputs */,
        int32_t /* nbShapeInputs */, DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept override
    {
        return guarded(-1,
            [&]
            {
                checkCounts(nbInputs, nbOutputs);
                for (int32_t i = 0; i < nbOutputs; ++i)
                {
                    outputs[i] = outputShape(mParams, i, inputs, exprBuilder);
                }
                return 0;
            });
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t /* nbOutputs */) noexcept override
    {
        return isSupported(inOut[pos].desc, pos, nbInputs);
    }

    int32_t getNbOutputs() const noexcept override
    {
        return kOutputs;
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        DynamicPluginTensorDesc const* /* outputs */, int32_t /* nbOutputs */) const noexcept override
    {
        return guarded(size_t{0},
            [&]
            {
                SsdNmsShape const shape = shapeFrom(inputs, nbInputs);
                return ssdNmsWorkspaceSize(&mParams, &shape);
            });
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /* out */,
        int32_t /* nbOutputs */) noexcept override
    {
        return guarded(-1,
            [&]
            {
                shapeFrom(in, nbInputs);
                mInputs = nbInputs;
                return 0;
            });
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /* outputDesc */,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(-1,
            [&]
            {
                enqueueOn(mParams, inputDesc, mInputs, inputs, outputs, workspace, stream);
                return 0;
            });
    }

    IPluginV3* attachToContext(IPluginResourceContext* /* context */) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return guarded<PluginFieldCollection const*>(nullptr,
            [&]
            {
                mFields = fieldsOf(mParams);
                mFields.emplace_back(kSerializationVersionField, &kSerializationVersion, PluginFieldType::kINT32, 1);
                mCollection = PluginFieldCollection{static_cast<int32_t>(mFields.size()), mFields.data()};
                return &mCollection;
            });
    }

private:
    SsdNmsParams mParams;
    int32_t mInputs{kFewestInputs};
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class SsdNmsCreator : public IPluginCreatorV3One
{
public:
    IPluginV3* createPlugin(
        AsciiChar const* /* name */, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override
    {
        return guarded<IPluginV3*>(
            nullptr, [&] { return new SsdNmsPlugin{paramsFrom(fields, phase == TensorRTPhase::kRUNTIME)}; });
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return guarded<PluginFieldCollection const*>(nullptr, [] { return announcedFields(); });
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return kName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return "";
    }
};

#else // TensorRT 8

//! What a plan holds.
struct Serialized
{
    char magic[4];
    int32_t version;
    int32_t inputs;
    SsdNmsParams params;
};

constexpr char kMagic[4] = {'S', 'S', 'D', 'N'};
static_assert(sizeof(Serialized) == 64, "the layout is part of the plan: change kSerializationVersion with it");

class SsdNmsPlugin : public IPluginV2DynamicExt
{
public:
    SsdNmsPlugin(SsdNmsParams const& params, int32_t inputs)
        : mParams{params}
        , mInputs{inputs}
    {
    }

    IPluginV2DynamicExt* clone() const noexcept override
    {
        return guarded<IPluginV2DynamicExt*>(nullptr, [&] { return new SsdNmsPlugin{*this}; });
    }

    DimsExprs getOutputDimensions(
        int32_t outputIndex, DimsExprs const* inputs, int32_t nbInputs, IExprBuilder& exprBuilder) noexcept override
    {
        DimsExprs invalid{};
        invalid.nbDims = -1;
        return guarded(invalid,
            [&]
            {
                checkCounts(nbInputs, kOutputs);
                return outputShape(mParams, outputIndex, inputs, exprBuilder);
            });
    }

    bool supportsFormatCombination(
        int32_t pos, PluginTensorDesc const* inOut, int32_t nbInputs, int32_t /* nbOutputs */) noexcept override
    {
        return isSupported(inOut[pos], pos, nbInputs);
    }

    //! Cannot refuse: it logs what is wrong, and enqueue(), which the builder calls to time it, then fails.
    void configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const* /* out */,
        int32_t nbOutputs) noexcept override
    {
        guarded(-1,
            [&]
            {
                mInputs = nbInputs;
                checkCounts(nbInputs, nbOutputs);
                SsdNmsShape const shape = shapeFrom(in, nbInputs);
                check(mParams, &shape);
                return 0;
            });
    }

    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t nbInputs, PluginTensorDesc const* /* outputs */,
        int32_t /* nbOutputs */) const noexcept override
    {
        return guarded(size_t{0},
            [&]
            {
                SsdNmsShape const shape = shapeFrom(inputs, nbInputs);
                return ssdNmsWorkspaceSize(&mParams, &shape);
            });
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /* outputDesc */,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(-1,
            [&]
            {
                enqueueOn(mParams, inputDesc, mInputs, inputs, outputs, workspace, stream);
                return 0;
            });
    }

    DataType getOutputDataType(
        int32_t index, DataType const* /* inputTypes */, int32_t /* nbInputs */) const noexcept override
    {
        return kOutputTypes[index];
    }

    AsciiChar const* getPluginType() const noexcept override
    {
        return kName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return kOutputs;
    }

    int32_t initialize() noexcept override
    {
        return 0;
    }

    void terminate() noexcept override
    {
    }

    size_t getSerializationSize() const noexcept override
    {
        return sizeof(Serialized);
    }

    void serialize(void* buffer) const noexcept override
    {
        Serialized serialized{};
        std::memcpy(serialized.magic, kMagic, sizeof(kMagic));
        serialized.version = kSerializationVersion;
        serialized.inputs = mInputs;
        serialized.params = mParams;
        std::memcpy(buffer, &serialized, sizeof(serialized));
    }

    void destroy() noexcept override
    {
        delete this;
    }

    void setPluginNamespace(AsciiChar const* pluginNamespace) noexcept override
    {
        guarded(-1,
            [&]
            {
                mNamespace = pluginNamespace == nullptr ? "" : pluginNamespace;
                return 0;
            });
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }

private:
    SsdNmsParams mParams;
    int32_t mInputs;
    std::string mNamespace;
};

class SsdNmsCreator : public IPluginCreator
{
public:
    IPluginV2* createPlugin(AsciiChar const* /* name */, PluginFieldCollection const* fields) noexcept override
    {
        return guarded<IPluginV2*>(nullptr, [&] { return make(paramsFrom(fields, false), kFewestInputs); });
    }

    IPluginV2* deserializePlugin(
        AsciiChar const* /* name */, void const* serialData, size_t serialLength) noexcept override
    {
        return guarded<IPluginV2*>(nullptr,
            [&]
            {
                Serialized serialized{};
                if (serialData == nullptr || serialLength != sizeof(serialized))
                {
                    throw std::invalid_argument{"the plan's SSDNMS has " + std::to_string(serialLength)
                        + " bytes, must be " + std::to_string(sizeof(serialized))};
                }
                std::memcpy(&serialized, serialData, sizeof(serialized));
                if (std::memcmp(serialized.magic, kMagic, sizeof(kMagic)) != 0)
                {
                    throw std::invalid_argument{"the plan's bytes for SSDNMS are not SSDNMS's"};
                }
                checkSerializationVersion(serialized.version);
                checkCounts(serialized.inputs, kOutputs);
                check(serialized.params, nullptr);
                return make(serialized.params, serialized.inputs);
            });
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return guarded<PluginFieldCollection const*>(nullptr, [] { return announcedFields(); });
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return kName;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    void setPluginNamespace(AsciiChar const* pluginNamespace) noexcept override
    {
        guarded(-1,
            [&]
            {
                mNamespace = pluginNamespace == nullptr ? "" : pluginNamespace;
                return 0;
            });
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }

private:
    IPluginV2* make(SsdNmsParams const& params, int32_t inputs) const
    {
        auto* const plugin = new SsdNmsPlugin{params, inputs};
        plugin->setPluginNamespace(mNamespace.c_str());
        return plugin;
    }

    std::string mNamespace;
};

#endif

REGISTER_TENSORRT_PLUGIN(SsdNmsCreator);

} // namespace
} // namespace ssd_nms
