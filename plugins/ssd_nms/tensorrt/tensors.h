//! \file tensors.h
//! Inputs and outputs of the SSDNMS node: which types and shapes it takes, and the call of ssd_nms.h for them.

#ifndef SSD_NMS_TENSORRT_TENSORS_H
#define SSD_NMS_TENSORRT_TENSORS_H

#include "attributes.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

constexpr int32_t kOutputs = 4;
constexpr int32_t kFewestInputs = 3;
constexpr int32_t kMostInputs = 5;

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

//! What the inputs' descriptions say, in one place for both kinds of description; no heap, since enqueue() needs it.
struct Described
{
    int32_t count{0};
    std::array<Dims, kMostInputs> dims{};
    std::array<DataType, kMostInputs> types{};
};

//! Dimensions that all inputs agree on.
SsdNmsShape shapeFrom(Described const& inputs)
{
    auto const& dims = inputs.dims;
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
    if (inputs.count > kSCORE_THRESHOLD)
    {
        require(is(kSCORE_THRESHOLD, {batch, 1}), kSCORE_THRESHOLD, "score_threshold", "[B,1]");
    }
    if (inputs.count > kIOU_THRESHOLD)
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
        return inputs.types[static_cast<size_t>(input)] == DataType::kHALF ? SSD_NMS_FLOAT16 : SSD_NMS_FLOAT32;
    };
    return SsdNmsShape{static_cast<int32_t>(batch), static_cast<int32_t>(anchors), static_cast<int32_t>(logits.d[2]),
        typeOf(kBOX_DELTAS), typeOf(kCLASS_LOGITS), inputs.count > kSCORE_THRESHOLD ? 1 : 0,
        inputs.count > kIOU_THRESHOLD ? 1 : 0};
}

SsdNmsShape shapeFrom(PluginTensorDesc const* inputs, int32_t count)
{
    checkCounts(count, kOutputs);
    Described described;
    described.count = count;
    for (size_t i = 0; i < static_cast<size_t>(count); ++i)
    {
        described.dims[i] = inputs[i].dims;
        described.types[i] = inputs[i].type;
    }
    return shapeFrom(described);
}

//! The largest shape of the optimisation profile.
SsdNmsShape shapeFrom(DynamicPluginTensorDesc const* inputs, int32_t count)
{
    checkCounts(count, kOutputs);
    Described described;
    described.count = count;
    for (size_t i = 0; i < static_cast<size_t>(count); ++i)
    {
        described.dims[i] = inputs[i].max;
        described.types[i] = inputs[i].desc.type;
    }
    return shapeFrom(described);
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

bool operator==(SsdNmsShape const& a, SsdNmsShape const& b)
{
    return a.batch == b.batch && a.anchors == b.anchors && a.classes == b.classes && a.deltasType == b.deltasType
        && a.logitsType == b.logitsType && a.hasScoreThresholds == b.hasScoreThresholds
        && a.hasIouThresholds == b.hasIouThresholds;
}

//! What a plugin knows of its calls, whichever of TensorRT's interfaces it has. A plan holds the first three.
class Operator
{
public:
    Operator(SsdNmsParams const& params, int32_t inputs, int64_t workspace)
        : mParams{params}
        , mInputs{inputs}
        , mWorkspace{workspace}
    {
        checkCounts(inputs, kOutputs);
    }

    SsdNmsParams const& params() const
    {
        return mParams;
    }

    //! Without the thresholds' inputs 3. TensorRT does not give their number to enqueue().
    int32_t const& inputs() const
    {
        return mInputs;
    }

    //! The bytes of workspace that TensorRT was asked for; 0: nobody configured the plugin.
    int64_t const& workspace() const
    {
        return mWorkspace;
    }

    //! Takes an optimisation profile.
    void configure(DynamicPluginTensorDesc const* inputs, int32_t inputCount, int32_t outputCount)
    {
        checkCounts(inputCount, outputCount);
        mInputs = inputCount;
        SsdNmsShape const shape = shapeFrom(inputs, inputCount);
        check(mParams, &shape);
        mWorkspace = std::max(mWorkspace, static_cast<int64_t>(ssdNmsWorkspaceSize(&mParams, &shape)));
    }

    //! Takes the shape of the calls to come, and checks it once for all of them.
    void prepare(PluginTensorDesc const* inputs, int32_t count)
    {
        mInputs = count;
        prepare(shapeFrom(inputs, count));
    }

    void enqueue(PluginTensorDesc const* inputDesc, void const* const* inputs, void* const* outputs, void* workspace,
        cudaStream_t stream)
    {
        SsdNmsShape const shape = shapeFrom(inputDesc, mInputs);
        if (!(shape == mPrepared)) // nobody prepared it
        {
            prepare(shape);
        }
        if (shape.batch == 0)
        {
            return; // TensorRT's empty tensor: there is nothing to write
        }
        SsdNmsTensors tensors{};
        tensors.boxDeltas = inputs[kBOX_DELTAS];
        tensors.classLogits = inputs[kCLASS_LOGITS];
        tensors.anchors = static_cast<float const*>(inputs[kANCHORS]);
        tensors.scoreThresholds =
            shape.hasScoreThresholds ? static_cast<float const*>(inputs[kSCORE_THRESHOLD]) : nullptr;
        tensors.iouThresholds = shape.hasIouThresholds ? static_cast<float const*>(inputs[kIOU_THRESHOLD]) : nullptr;
        tensors.numDetections = static_cast<int32_t*>(outputs[kNUM_DETECTIONS]);
        tensors.boxes = static_cast<float*>(outputs[kDETECTION_BOXES]);
        tensors.scores = static_cast<float*>(outputs[kDETECTION_SCORES]);
        tensors.labels = static_cast<int32_t*>(outputs[kDETECTION_CLASSES]);
        SsdNmsStatus const status = ssdNmsLaunch(&mParams, &shape, &tensors, workspace, mNeeded, stream);
        if (status != SSD_NMS_OK)
        {
            std::string const reason = status == SSD_NMS_LAUNCH_FAILED ? ssdNmsLastError() : "";
            throw std::runtime_error{
                std::string{"enqueue: "} + ssdNmsStatusString(status) + (reason.empty() ? "" : ": " + reason)};
        }
    }

private:
    void prepare(SsdNmsShape const& shape)
    {
        size_t needed = 0;
        if (shape.batch > 0)
        {
            check(mParams, &shape);
            needed = ssdNmsWorkspaceSize(&mParams, &shape);
            if (mWorkspace > 0 && needed > static_cast<uint64_t>(mWorkspace))
            {
                throw std::runtime_error{"batch " + std::to_string(shape.batch) + " x " + std::to_string(shape.anchors)
                    + " anchors x " + std::to_string(shape.classes) + " classes need " + std::to_string(needed)
                    + " bytes of workspace, the plan was built with " + std::to_string(mWorkspace)
                    + ": the shape is outside its optimisation profile"};
            }
        }
        mPrepared = shape;
        mNeeded = needed;
    }

    SsdNmsParams mParams;
    int32_t mInputs;
    int64_t mWorkspace;
    SsdNmsShape mPrepared{}; //!< The last shape that was checked: none, so far.
    size_t mNeeded{0}; //!< Its workspace.
};

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_TENSORRT_TENSORS_H
