//! \file adapter_v3.h
//! SSDNMS behind IPluginV3, which TensorRT has from 10 on.

#ifndef SSD_NMS_TENSORRT_ADAPTER_V3_H
#define SSD_NMS_TENSORRT_ADAPTER_V3_H

#include "tensors.h"

namespace ssd_nms
{
namespace
{

using namespace nvinfer1;

class SsdNmsPlugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    explicit SsdNmsPlugin(Operator const& op)
        : mOperator{op}
    {
    }

    //! The fields point into the plugin that made them, so each makes its own.
    SsdNmsPlugin(SsdNmsPlugin const& other)
        : SsdNmsPlugin{other.mOperator}
    {
    }

    SsdNmsPlugin& operator=(SsdNmsPlugin const&) = delete;

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
                mOperator.configure(in, nbInputs, nbOutputs);
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
                    outputs[i] = outputShape(mOperator.params(), i, inputs, exprBuilder);
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
                return ssdNmsWorkspaceSize(&mOperator.params(), &shape);
            });
    }

    int32_t onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const* /* out */,
        int32_t /* nbOutputs */) noexcept override
    {
        return guarded(-1,
            [&]
            {
                mOperator.prepare(in, nbInputs);
                return 0;
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

    IPluginV3* attachToContext(IPluginResourceContext* /* context */) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return guarded<PluginFieldCollection const*>(nullptr,
            [&]
            {
                mFields = fieldsOf(mOperator.params());
                mFields.emplace_back(kSerializationVersionField, &kSerializationVersion, PluginFieldType::kINT32, 1);
                mFields.emplace_back(kInputsField, &mOperator.inputs(), PluginFieldType::kINT32, 1);
                mFields.emplace_back(kWorkspaceField, &mOperator.workspace(), PluginFieldType::kINT64, 1);
                mCollection = PluginFieldCollection{static_cast<int32_t>(mFields.size()), mFields.data()};
                return &mCollection;
            });
    }

private:
    Operator mOperator;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

class SsdNmsCreator : public IPluginCreatorV3One
{
public:
    IPluginV3* createPlugin(
        AsciiChar const* /* name */, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override
    {
        return guarded<IPluginV3*>(nullptr,
            [&]
            {
                PlanFields plan{kFewestInputs, 0};
                SsdNmsParams const params = paramsFrom(fields, phase == TensorRTPhase::kRUNTIME ? &plan : nullptr);
                return new SsdNmsPlugin{Operator{params, plan.inputs, plan.workspace}};
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

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return "";
    }
};

} // namespace
} // namespace ssd_nms

#endif // SSD_NMS_TENSORRT_ADAPTER_V3_H
