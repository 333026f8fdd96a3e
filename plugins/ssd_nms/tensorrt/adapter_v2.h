//! \file adapter_v2.h
//! SSDNMS behind IPluginV2DynamicExt, for TensorRT 8.6.

#ifndef SSD_NMS_TENSORRT_ADAPTER_V2_H
#define SSD_NMS_TENSORRT_ADAPTER_V2_H

#include "tensors.h"

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

//! What a plan holds.
struct Serialized
{
    char magic[4];
    int32_t version;
    int32_t inputs;
    SsdNmsParams params;
    int64_t workspace;
};

constexpr char kMagic[4] = {'S', 'S', 'D', 'N'};
static_assert(sizeof(Serialized) == 80, "the layout is part of the plan: change kSerializationVersion with it");

class SsdNmsPlugin : public IPluginV2DynamicExt
{
public:
    explicit SsdNmsPlugin(Operator const& op)
        : mOperator{op}
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
                return outputShape(mOperator.params(), outputIndex, inputs, exprBuilder);
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
                mOperator.configure(in, nbInputs, nbOutputs);
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
                return ssdNmsWorkspaceSize(&mOperator.params(), &shape);
            });
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* /* outputDesc */,
        void const* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        return guarded(-1,
            [&]
            {
                mOperator.enqueue(inputDesc, inputs, outputs, workspace, stream);
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
        serialized.inputs = mOperator.inputs();
        serialized.params = mOperator.params();
        serialized.workspace = mOperator.workspace();
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
    Operator mOperator;
    std::string mNamespace;
};

class SsdNmsCreator : public IPluginCreator
{
public:
    IPluginV2* createPlugin(AsciiChar const* /* name */, PluginFieldCollection const* fields) noexcept override
    {
        return guarded<IPluginV2*>(nullptr, [&] { return make(Operator{paramsFrom(fields), kFewestInputs, 0}); });
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
                check(serialized.params, nullptr);
                return make(Operator{serialized.params, serialized.inputs, serialized.workspace});
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
    IPluginV2* make(Operator const& op) const
    {
        auto* const plugin = new SsdNmsPlugin{op};
        plugin->setPluginNamespace(mNamespace.c_str());
        return plugin;
    }

    std::string mNamespace;
};

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_TENSORRT_ADAPTER_V2_H
