//! \file engine.cpp
//! What both engines need.

#include "engine.h"

#include "errors.h"

#include <dlfcn.h>

void Tensor::setShape(std::vector<int64_t> const& shape)
{
    bool fits = type.name != nullptr && !shape.empty() && shape.front() < 0;
    for (size_t i = 1; i < shape.size(); ++i)
    {
        fits = fits && shape[i] > 0;
    }
    if (!fits)
    {
        throw Refused("model.onnx: " + name
            + " is no tensor of UINT8, INT32 or FP32 with an open batch and otherwise fixed sizes");
    }
    row.assign(shape.begin() + 1, shape.end());
}

void* openBeside(std::string const& name, std::string const& engine)
{
    Dl_info self{};
    if (dladdr(reinterpret_cast<void const*>(&openBeside), &self) == 0 || self.dli_fname == nullptr)
    {
        throw Refused("the backend's own file cannot be found", TRITONSERVER_ERROR_NOT_FOUND);
    }
    std::string path = self.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + name;
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
    {
        throw Refused(
            engine + " cannot be loaded, publish the model again: " + dlerror(), TRITONSERVER_ERROR_NOT_FOUND);
    }
    return library;
}
