//! \file backend.cpp
//! Triton backend `ssd_onnxruntime`: ONNX Runtime or OpenVINO on the CPU in the server's own process, behind the
//! contract of docs/design.md. This file has the functions that Triton calls.
//!
//! It lies beside the engines' libraries in a folder of backends (tritonserver --backend-directory); version folders
//! hold data only. build/publish/backends/python/model.py does the same with ONNX Runtime where there is no compiler.

#include "instance.h"

namespace
{
//! An object of ours that Triton keeps for us; nullptr where it was not made.
template <typename Object, typename Owner>
Object* kept(Owner* owner, TRITONSERVER_Error* (*getState)(Owner*, void**))
{
    void* state{nullptr};
    check(getState(owner, &state));
    return static_cast<Object*>(state);
}

template <typename Object, typename Owner>
void keep(std::unique_ptr<Object> object, Owner* owner, TRITONSERVER_Error* (*setState)(Owner*, void*))
{
    check(setState(owner, object.get()));
    static_cast<void>(object.release());
}
} // namespace

#define SSD_EXPORT extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error*

SSD_EXPORT TRITONBACKEND_Initialize(TRITONBACKEND_Backend* backend)
{
    return guarded(
        [&]
        {
            uint32_t major{0};
            uint32_t minor{0};
            check(TRITONBACKEND_ApiVersion(&major, &minor));
            if (major != kTritonMajor || minor < kTritonMinor)
            {
                throw Refused("this server has version " + std::to_string(major) + "." + std::to_string(minor)
                        + " of the backend interface, needed is " + std::to_string(kTritonMajor) + "."
                        + std::to_string(kTritonMinor) + " or later: use Triton 2.37 or later",
                    TRITONSERVER_ERROR_UNSUPPORTED);
            }
            keep(std::make_unique<Backend>(), backend, TRITONBACKEND_BackendSetState);
        });
}

SSD_EXPORT TRITONBACKEND_Finalize(TRITONBACKEND_Backend* backend)
{
    return guarded([&] { delete kept<Backend>(backend, TRITONBACKEND_BackendState); });
}

SSD_EXPORT TRITONBACKEND_GetBackendAttribute(
    TRITONBACKEND_Backend* /* backend */, TRITONBACKEND_BackendAttribute* attributes)
{
    return TRITONBACKEND_BackendAttributeSetParallelModelInstanceLoading(attributes, /* enabled = */ true);
}

SSD_EXPORT TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model* model)
{
    return guarded(
        [&]
        {
            TRITONBACKEND_Backend* backend{nullptr};
            check(TRITONBACKEND_ModelBackend(model, &backend));
            auto& common = *kept<Backend>(backend, TRITONBACKEND_BackendState);
            keep(std::make_unique<Model>(common, model), model, TRITONBACKEND_ModelSetState);
        });
}

SSD_EXPORT TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model* model)
{
    return guarded([&] { delete kept<Model>(model, TRITONBACKEND_ModelState); });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance* instance)
{
    return guarded(
        [&]
        {
            TRITONBACKEND_Model* model{nullptr};
            check(TRITONBACKEND_ModelInstanceModel(instance, &model));
            auto& common = *kept<Model>(model, TRITONBACKEND_ModelState);
            keep(std::make_unique<Instance>(common, instance), instance, TRITONBACKEND_ModelInstanceSetState);
        });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance* instance)
{
    return guarded([&] { delete kept<Instance>(instance, TRITONBACKEND_ModelInstanceState); });
}

SSD_EXPORT TRITONBACKEND_ModelInstanceExecute(
    TRITONBACKEND_ModelInstance* instance, TRITONBACKEND_Request** requests, uint32_t count)
{
    return guarded(
        [&]
        {
            auto& answering = *kept<Instance>(instance, TRITONBACKEND_ModelInstanceState);
            for (uint32_t i = 0; i < count; ++i)
            {
                answering.execute(requests[i]);
            }
        });
}
