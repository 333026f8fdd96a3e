//! \file driver.h
//! Calls the TensorRT adapter as TensorRT does, from TensorRT's headers alone, over the reference on host memory.

#ifndef EMULATOR_DRIVER_H
#define EMULATOR_DRIVER_H

#include <NvInfer.h>

#include "ssd_nms.h"

#include <cstdlib>
#include <new>

// The reference behind counters, and with a workspace, which it has not.

static size_t gAllocations = 0;
static size_t gChecks = 0;
static size_t gLaunches = 0;

void* operator new(size_t size)
{
    ++gAllocations;
    void* const memory = std::malloc(size);
    return memory == nullptr ? throw std::bad_alloc{} : memory;
}

void operator delete(void* memory) noexcept
{
    std::free(memory);
}

void operator delete(void* memory, size_t) noexcept
{
    std::free(memory);
}

static SsdNmsStatus countedValidate(SsdNmsParams const* params, SsdNmsShape const* shape, char* message, size_t size)
{
    ++gChecks;
    return ssdNmsValidate(params, shape, message, size);
}

static size_t tenBytesForAnImage(SsdNmsParams const* /* params */, SsdNmsShape const* shape)
{
    ++gChecks;
    return static_cast<size_t>(shape->batch) * 10;
}

static SsdNmsStatus countedLaunch(SsdNmsParams const* params, SsdNmsShape const* shape, SsdNmsTensors const* tensors,
    void* workspace, size_t workspaceSize, void* stream)
{
    size_t const before = gAllocations;
    ++gLaunches;
    SsdNmsStatus const status = workspaceSize == static_cast<size_t>(shape->batch) * 10
        ? ssdNmsLaunch(params, shape, tensors, workspace, workspaceSize, stream)
        : SSD_NMS_WORKSPACE_TOO_SMALL;
    gAllocations = before; // the reference's are its own
    return status;
}

#define ssdNmsValidate countedValidate
#define ssdNmsWorkspaceSize tenBytesForAnImage
#define ssdNmsLaunch countedLaunch

#if NV_TENSORRT_MAJOR >= 10
#include "tensorrt/adapter_v3.h"
#else
#include "tensorrt/adapter_v2.h"
#endif

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

void release(SsdNmsPlugin* plugin)
{
#if NV_TENSORRT_MAJOR >= 10
    delete plugin;
#else
    plugin->destroy();
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

//! \param isPrepared whether TensorRT's call before the first enqueue() is made.
int32_t enqueue(SsdNmsPlugin& plugin, Inputs const& inputs, Tensors& tensors, bool isPrepared = true)
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
    if (isPrepared && plugin.onShapeChange(descs.data(), inputs.count(), descs.data() + inputs.count(), kOutputs) != 0)
    {
        return -1;
    }
#else
    static_cast<void>(isPrepared);
#endif
    gAllocations = 0;
    return plugin.enqueue(descs.data(), descs.data() + inputs.count(), in, out, nullptr, nullptr);
}

} // namespace

#endif // EMULATOR_DRIVER_H
