//! \file engine.h
//! What runs an ONNX file: the interface of the two engines, ONNX Runtime and OpenVINO.

#ifndef SSD_ENGINE_H
#define SSD_ENGINE_H

#include "triton.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

//! One type of the contract.
struct Type
{
    TRITONSERVER_DataType triton{TRITONSERVER_TYPE_INVALID};
    char const* name{nullptr};
    size_t bytes{0};
};

constexpr Type kUint8{TRITONSERVER_TYPE_UINT8, "UINT8", 1};
constexpr Type kInt32{TRITONSERVER_TYPE_INT32, "INT32", 4};
constexpr Type kFp32{TRITONSERVER_TYPE_FP32, "FP32", 4};

//! An input or output of the ONNX file.
struct Tensor
{
    std::string name;
    Type type;
    std::vector<int64_t> row; //!< Sizes without the batch, which is the first dimension.

    //! Bytes of one row.
    size_t bytes() const noexcept
    {
        size_t bytes = type.bytes;
        for (int64_t const size : row)
        {
            bytes *= static_cast<size_t>(size);
        }
        return bytes;
    }

    //! Sizes of one row as Triton's JSON writes them, such as [300,300,3].
    std::string dims() const
    {
        std::string text = "[";
        for (size_t i = 0; i < row.size(); ++i)
        {
            text += (i > 0 ? "," : "") + std::to_string(row[i]);
        }
        return text + "]";
    }

    //! Takes sizes with an open batch (a size below 0) in front.
    //! \throw Refused where this is no tensor of the contract's kind.
    void setShape(std::vector<int64_t> const& shape);
};

//! An output that a request asks for.
struct Wanted
{
    size_t index; //!< in Session::outputs
    void* memory; //!< for its rows
};

constexpr size_t kAlignment = 16; //!< Kernels may load vectors: memory that begins elsewhere is copied.

inline bool aligned(void const* pointer) noexcept
{
    return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0;
}

//! Memory that begins at a multiple of kAlignment and is kept for the next time.
class Scratch
{
public:
    void* atLeast(size_t bytes)
    {
        if (mMemory.size() < bytes + kAlignment)
        {
            mMemory.resize(bytes + kAlignment);
        }
        auto const address = reinterpret_cast<uintptr_t>(mMemory.data());
        return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }

private:
    std::vector<char> mMemory;
};

//! What runs one request at a time.
class Runner
{
public:
    virtual ~Runner() = default;

    //! \param batch Rows of every tensor.
    //! \param inputs Aligned memory with all rows of each input, in the order of Session::inputs.
    //! \param outputs Aligned memory for all rows of the outputs that are wanted.
    //! \throw std::runtime_error with what the engine says went wrong.
    virtual void run(int64_t batch, std::vector<void*> const& inputs, std::vector<Wanted> const& outputs) = 0;
};

//! A loaded ONNX file. Must outlive its runners.
class Session
{
public:
    virtual ~Session() = default;

    //! Whether all runners of a model can be this session's; if not, each needs a session.
    virtual bool shared() const noexcept = 0;

    virtual std::unique_ptr<Runner> runner() = 0;

    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
};

//! How an ONNX file is to be run.
struct Settings
{
    int32_t threads{1}; //!< of each runner
    int32_t runners{1}; //!< that run at once
    std::string precision; //!< In which OpenVINO computes what is not quantised: f32, bf16 or f16.
};

//! An engine's library.
class Engine
{
public:
    virtual ~Engine() = default;

    //! \param file The content of an ONNX file.
    //! \throw Refused, std::runtime_error where it cannot be loaded, or has other tensors than the contract's kind.
    virtual std::unique_ptr<Session> load(std::string const& file, Settings const& settings) const = 0;
};

//! \throw Refused where its library, which lies beside this one, cannot be loaded.
std::unique_ptr<Engine> makeOnnxRuntime();
std::unique_ptr<Engine> makeOpenVino();

//! A library of this folder. Never closed: engines have threads and thread-local state of their own.
//! \throw Refused where it cannot be loaded.
void* openBeside(std::string const& name, std::string const& engine);

#endif // SSD_ENGINE_H
