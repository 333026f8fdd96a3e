//! \file adapters.cpp
//! Drives the TensorRT adapter as TensorRT does, from TensorRT's headers alone, over the reference on host memory.
//!
//! Creator, shapes, formats, refusals, serialisation and enqueue. Prints what failed and ends with 1, or prints "ok".

#include <NvInfer.h>

// There is no registry to register with.
#undef REGISTER_TENSORRT_PLUGIN
#define REGISTER_TENSORRT_PLUGIN(name) static_assert(sizeof(name) > 0, "is complete")
#include "tensorrt/plugin.cpp"

#include <memory>

using namespace nvinfer1;
using namespace ssd_nms;

namespace
{

#if NV_TENSORRT_MAJOR >= 10
using Extent = int64_t;
using Plugin = IPluginV3;
#else
using Extent = int32_t;
using Plugin = IPluginV2;
#endif

int gFailures = 0;
std::string gLog;

void expect(bool passed, std::string const& what)
{
    if (!passed)
    {
        std::printf("FAILED: %s\n  log: %s\n", what.c_str(), gLog.c_str());
        ++gFailures;
    }
    gLog.clear();
}

class Logger : public ILogger
{
    void log(Severity /* severity */, AsciiChar const* message) noexcept override
    {
        gLog += std::string{message} + "\n";
    }
} gLogger;

class Extent1 : public IDimensionExpr, private apiv::VDimensionExpr
{
public:
    explicit Extent1(Extent value)
        : mValue{value}
    {
        mImpl = this;
    }

    ~Extent1() noexcept override = default;

private:
    bool isConstant() const override
    {
        return mValue >= 0;
    }

    Extent getConstantValue() const override
    {
        return mValue;
    }

#if NV_TENSORRT_MAJOR >= 10
    bool isSizeTensor() const override
    {
        return false;
    }
#endif

    Extent mValue; //!< -1: dynamic
};

class Builder : public IExprBuilder, private apiv::VExprBuilder
{
public:
    Builder()
    {
        mImpl = this;
    }

    ~Builder() noexcept override = default;

    IDimensionExpr const* make(Extent value)
    {
        mAll.push_back(std::make_unique<Extent1>(value));
        return mAll.back().get();
    }

private:
    IDimensionExpr const* constant(Extent value) override
    {
        return make(value);
    }

    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }

#if NV_TENSORRT_MAJOR >= 10
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override
    {
        return nullptr;
    }
#endif

    std::vector<std::unique_ptr<Extent1>> mAll;
};

Dims dimsOf(std::initializer_list<Extent> values)
{
    Dims dims{};
    for (Extent const value : values)
    {
        dims.d[dims.nbDims++] = value;
    }
    return dims;
}

struct Inputs
{
    std::vector<Dims> dims;
    std::vector<DataType> types;

    std::vector<PluginTensorDesc> descs() const
    {
        std::vector<PluginTensorDesc> result(dims.size() + kOutputs);
        for (size_t i = 0; i < dims.size(); ++i)
        {
            result[i].dims = dims[i];
            result[i].type = types[i];
            result[i].format = TensorFormat::kLINEAR;
        }
        for (size_t i = 0; i < kOutputs; ++i)
        {
            result[dims.size() + i].type = kOutputTypes[i];
            result[dims.size() + i].format = TensorFormat::kLINEAR;
        }
        return result;
    }

    std::vector<DynamicPluginTensorDesc> dynamicDescs() const
    {
        std::vector<DynamicPluginTensorDesc> result;
        for (PluginTensorDesc const& desc : descs())
        {
            DynamicPluginTensorDesc dynamic{};
            dynamic.desc = desc;
            dynamic.min = dynamic.max = desc.dims;
            result.push_back(dynamic);
        }
        return result;
    }

    int32_t count() const
    {
        return static_cast<int32_t>(dims.size());
    }
};

Inputs inputsOf(Extent batch, Extent anchors, Extent classes, size_t count, DataType type = DataType::kFLOAT)
{
    Inputs inputs{{dimsOf({batch, anchors, 4}), dimsOf({batch, anchors, classes}), dimsOf({anchors, 4})},
        {type, type, DataType::kFLOAT}};
    for (size_t i = inputs.dims.size(); i < count; ++i)
    {
        inputs.dims.push_back(dimsOf({batch, 1}));
        inputs.types.push_back(DataType::kFLOAT);
    }
    inputs.dims.resize(count);
    inputs.types.resize(count);
    return inputs;
}

SsdNmsCreator gCreator;

Plugin* create(std::vector<PluginField> fields)
{
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
#if NV_TENSORRT_MAJOR >= 10
    return gCreator.createPlugin("nms", &collection, TensorRTPhase::kBUILD);
#else
    return gCreator.createPlugin("nms", &collection);
#endif
}

//! The plugin as it comes back from a plan.
SsdNmsPlugin* throughPlan(SsdNmsPlugin& plugin)
{
#if NV_TENSORRT_MAJOR >= 10
    PluginFieldCollection const* const fields = plugin.getFieldsToSerialize();
    return static_cast<SsdNmsPlugin*>(gCreator.createPlugin("nms", fields, TensorRTPhase::kRUNTIME));
#else
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    return static_cast<SsdNmsPlugin*>(gCreator.deserializePlugin("nms", bytes.data(), bytes.size()));
#endif
}

bool configure(SsdNmsPlugin& plugin, Inputs const& inputs)
{
    auto const descs = inputs.dynamicDescs();
    gLog.clear();
#if NV_TENSORRT_MAJOR >= 10
    return plugin.configurePlugin(descs.data(), inputs.count(), descs.data() + inputs.count(), kOutputs) == 0;
#else
    plugin.configurePlugin(descs.data(), inputs.count(), descs.data() + inputs.count(), kOutputs);
    return gLog.empty();
#endif
}

size_t workspaceOf(SsdNmsPlugin const& plugin, Inputs const& inputs)
{
#if NV_TENSORRT_MAJOR >= 10
    auto const descs = inputs.dynamicDescs();
#else
    auto const descs = inputs.descs();
#endif
    return plugin.getWorkspaceSize(descs.data(), inputs.count(), descs.data() + inputs.count(), kOutputs);
}

//! \return the four shapes, -1 for what is dynamic; empty if the plugin refuses.
std::vector<std::vector<Extent>> shapesOf(SsdNmsPlugin& plugin, Inputs const& inputs)
{
    Builder builder;
    std::vector<DimsExprs> exprs(inputs.dims.size());
    for (size_t i = 0; i < exprs.size(); ++i)
    {
        exprs[i].nbDims = inputs.dims[i].nbDims;
        for (int32_t k = 0; k < exprs[i].nbDims; ++k)
        {
            exprs[i].d[k] = builder.make(inputs.dims[i].d[k]);
        }
    }
    DimsExprs outputs[kOutputs]{};
#if NV_TENSORRT_MAJOR >= 10
    if (plugin.getOutputShapes(exprs.data(), inputs.count(), nullptr, 0, outputs, kOutputs, builder) != 0)
    {
        return {};
    }
#else
    for (int32_t i = 0; i < kOutputs; ++i)
    {
        outputs[i] = plugin.getOutputDimensions(i, exprs.data(), inputs.count(), builder);
    }
#endif
    std::vector<std::vector<Extent>> shapes;
    for (DimsExprs const& output : outputs)
    {
        if (output.nbDims < 0)
        {
            return {};
        }
        shapes.emplace_back();
        for (int32_t k = 0; k < output.nbDims; ++k)
        {
            shapes.back().push_back(output.d[k]->getConstantValue());
        }
    }
    return shapes;
}

bool supports(SsdNmsPlugin& plugin, Inputs const& inputs, int32_t position, DataType type, TensorFormat format)
{
#if NV_TENSORRT_MAJOR >= 10
    auto descs = inputs.dynamicDescs();
    descs[static_cast<size_t>(position)].desc.type = type;
    descs[static_cast<size_t>(position)].desc.format = format;
#else
    auto descs = inputs.descs();
    descs[static_cast<size_t>(position)].type = type;
    descs[static_cast<size_t>(position)].format = format;
#endif
    return plugin.supportsFormatCombination(position, descs.data(), inputs.count(), kOutputs);
}

struct alignas(16) Buffer
{
    float values[4096];
};

struct Tensors
{
    Buffer inputs[kMostInputs]{};
    Buffer outputs[kOutputs]{};
};

int32_t enqueue(SsdNmsPlugin& plugin, Inputs const& inputs, Tensors& tensors)
{
    auto const descs = inputs.descs();
    void const* in[kMostInputs];
    void* out[kOutputs];
    for (size_t i = 0; i < kMostInputs; ++i)
    {
        in[i] = &tensors.inputs[i];
    }
    for (size_t i = 0; i < kOutputs; ++i)
    {
        out[i] = &tensors.outputs[i];
    }
    gLog.clear();
#if NV_TENSORRT_MAJOR >= 10
    if (plugin.onShapeChange(descs.data(), inputs.count(), descs.data() + inputs.count(), kOutputs) != 0)
    {
        return -1;
    }
#endif
    return plugin.enqueue(descs.data(), descs.data() + inputs.count(), in, out, nullptr, nullptr);
}

void testFormats(SsdNmsPlugin& plugin)
{
    Inputs const inputs = inputsOf(2, 10, 3, 5);
    for (int32_t position = 0; position < 9; ++position)
    {
        std::string const where = "format of tensor " + std::to_string(position);
        bool const isFlexible = position < 2;
        bool const isInt = position == 5 || position == 8;
        auto const linear = TensorFormat::kLINEAR;
        expect(supports(plugin, inputs, position, DataType::kFLOAT, linear) == !isInt, where + ": FP32");
        expect(supports(plugin, inputs, position, DataType::kHALF, linear) == isFlexible, where + ": FP16");
        expect(supports(plugin, inputs, position, DataType::kINT32, linear) == isInt, where + ": INT32");
        expect(!supports(plugin, inputs, position, DataType::kINT8, linear), where + ": INT8");
        expect(!supports(plugin, inputs, position, DataType::kFLOAT, TensorFormat::kCHW32), where + ": CHW32");
    }
}

void testShapes(SsdNmsPlugin& plugin)
{
    std::vector<std::vector<Extent>> const wanted{{-1, 1}, {-1, 7, 4}, {-1, 7}, {-1, 7}};
    expect(shapesOf(plugin, inputsOf(-1, 10, 3, 3)) == wanted, "a dynamic batch");
    expect(shapesOf(plugin, inputsOf(-1, 10, -1, 3)).empty(), "a dynamic C is refused");
    Inputs flat = inputsOf(2, 10, 3, 3);
    flat.dims[0] = dimsOf({2, 40});
    expect(shapesOf(plugin, flat).empty(), "deltas without three dimensions are refused");
    expect(shapesOf(plugin, inputsOf(2, 10, 3, 2)).empty(), "two inputs are refused");
    expect(shapesOf(plugin, inputsOf(2, 10, 3, 6)).empty(), "six inputs are refused");
}

void testConfigure(SsdNmsPlugin& plugin)
{
    Inputs const good = inputsOf(2, 10, 3, 5, DataType::kHALF);
    expect(configure(plugin, good), "a good configuration");
    SsdNmsShape const shape{2, 10, 3, SSD_NMS_FLOAT16, SSD_NMS_FLOAT16, 1, 1};
    SsdNmsParams params = defaultParams();
    params.maxDetections = 7;
    expect(workspaceOf(plugin, good) == ssdNmsWorkspaceSize(&params, &shape), "the core's workspace");
    for (size_t i = 0; i < good.dims.size(); ++i)
    {
        Inputs bad = good;
        bad.dims[i].d[0] += 1;
        bool const passed = configure(plugin, bad);
        char const* const names[] = {"class_logits", "class_logits", "anchors", "score_threshold", "iou_threshold"};
        bool const isNamed = gLog.find(names[i]) != std::string::npos;
        expect(!passed && isNamed, "a wrong dimension of input " + std::to_string(i) + " is refused by name");
    }
    Inputs const background = inputsOf(2, 10, 1, 3);
    bool const passed = configure(plugin, background);
    expect(!passed && gLog.find("it is the background") != std::string::npos, "nothing but background is refused");
    Inputs const large = inputsOf(1, 1 << 24, 300, 3);
    bool const passedLarge = configure(plugin, large);
    expect(
        !passedLarge && gLog.find("16777216 anchors x 299") != std::string::npos, "too large is refused with figures");
    configure(plugin, good);
}

//! What TensorRT calls at run time gives what the library gives.
void testEnqueue(SsdNmsPlugin& plugin, SsdNmsParams const& params, size_t count)
{
    Inputs const inputs = inputsOf(2, 10, 3, count);
    Tensors got;
    uint32_t random = 1;
    for (Buffer& buffer : got.inputs)
    {
        for (float& value : buffer.values)
        {
            random = random * 1664525U + 1013904223U;
            value = static_cast<float>(random >> 8) / 16777216.0F * 2.0F - 0.5F;
        }
    }
    for (size_t i = 0; i < 2; ++i)
    {
        got.inputs[kSCORE_THRESHOLD].values[i] = 0.3F + 0.1F * static_cast<float>(i);
        got.inputs[kIOU_THRESHOLD].values[i] = 0.2F;
    }
    Tensors want = got;
    std::string const name = "enqueue with " + std::to_string(count) + " inputs";
    configure(plugin, inputs);
    SsdNmsPlugin* const runtime = throughPlan(plugin);
    expect(runtime != nullptr, name + ": from a plan");
    expect(enqueue(*runtime, inputs, got) == 0, name + ": runs");
    SsdNmsShape const shape{2, 10, 3, 0, 0, count > 3 ? 1 : 0, count > 4 ? 1 : 0};
    auto const at = [](Buffer& buffer)
    {
        return static_cast<float*>(buffer.values);
    };
    SsdNmsTensors const tensors{at(want.inputs[0]), at(want.inputs[1]), at(want.inputs[2]), at(want.inputs[3]),
        at(want.inputs[4]), reinterpret_cast<int32_t*>(at(want.outputs[0])), at(want.outputs[1]), at(want.outputs[2]),
        reinterpret_cast<int32_t*>(at(want.outputs[3]))};
    expect(ssdNmsLaunch(&params, &shape, &tensors, nullptr, 0, nullptr) == SSD_NMS_OK, name + ": the library runs");
    int32_t detections = 0;
    std::memcpy(&detections, at(got.outputs[0]), sizeof(detections));
    expect(detections > 0, name + ": finds something");
    expect(std::memcmp(got.outputs, want.outputs, sizeof(want.outputs)) == 0, name + ": the same bits");

    Inputs wrong = inputs;
    wrong.dims[1].d[1] = 11;
    expect(enqueue(*runtime, wrong, got) != 0, name + ": a wrong shape is refused");
    expect(enqueue(*runtime, inputsOf(0, 10, 3, count), got) == 0, name + ": an empty batch is nothing to do");
#if NV_TENSORRT_MAJOR >= 10
    delete runtime;
#else
    runtime->destroy();
#endif
}

void testPlans(SsdNmsPlugin& plugin)
{
#if NV_TENSORRT_MAJOR >= 10
    PluginFieldCollection const* const fields = plugin.getFieldsToSerialize();
    std::vector<PluginField> changed{fields->fields, fields->fields + fields->nbFields};
    PluginFieldCollection collection{fields->nbFields, changed.data()};
    int32_t const version = 9;
    changed.back().data = &version;
    auto const read = [&]
    {
        return gCreator.createPlugin("nms", &collection, TensorRTPhase::kRUNTIME);
    };
    bool const isRefused = read() == nullptr && gLog.find("serialization version 9") != std::string::npos;
    expect(isRefused, "a plan of another version is refused");
    collection.nbFields -= 1;
    expect(read() == nullptr, "a plan without a version is refused");
    expect(create(changed) == nullptr, "a network cannot set the version");
#else
    std::vector<char> bytes(plugin.getSerializationSize());
    plugin.serialize(bytes.data());
    bytes[4] = 9;
    expect(gCreator.deserializePlugin("nms", bytes.data(), bytes.size()) == nullptr, "a plan of another version");
    expect(gCreator.deserializePlugin("nms", bytes.data(), bytes.size() - 1) == nullptr, "a short plan");
#endif
}

} // namespace

extern "C" ILogger* getLogger() noexcept
{
    return &gLogger;
}

int main()
{
    SsdNmsParams params = defaultParams();
    params.maxDetections = 7;
    PluginFieldCollection const* const announced = gCreator.getFieldNames();
    expect(announced != nullptr && announced->nbFields == 10, "ten attributes are announced");
    Plugin* const created = create({PluginField{"max_detections", &params.maxDetections, PluginFieldType::kINT32, 1}});
    expect(created != nullptr, "creation");
    expect(create({PluginField{"foo", &params.maxDetections, PluginFieldType::kINT32, 1}}) == nullptr, "unknown");
    auto& plugin = *static_cast<SsdNmsPlugin*>(created);
    testFormats(plugin);
    testShapes(plugin);
    testConfigure(plugin);
    for (size_t const count : {3U, 4U, 5U})
    {
        testEnqueue(plugin, params, count);
    }
    testPlans(plugin);
    auto* const copy = plugin.clone();
    expect(copy != nullptr, "clone");
#if NV_TENSORRT_MAJOR >= 10
    int64_t const many = int64_t{1} << 40;
    expect(create({PluginField{"max_detections", &many, PluginFieldType::kINT64, 1}}) == nullptr, "64 bits too many");
    int64_t const few = 5;
    Plugin* const from64 = create({PluginField{"max_detections", &few, PluginFieldType::kINT64, 1}});
    expect(from64 != nullptr, "64 bits that fit");
    for (auto const type : {PluginCapabilityType::kCORE, PluginCapabilityType::kBUILD, PluginCapabilityType::kRUNTIME})
    {
        expect(plugin.getCapabilityInterface(type) != nullptr, "a capability");
    }
    delete from64;
    delete copy;
    delete created;
#else
    copy->destroy();
    created->destroy();
#endif
    std::printf("%s", gFailures == 0 ? "ok\n" : "");
    return gFailures == 0 ? 0 : 1;
}
