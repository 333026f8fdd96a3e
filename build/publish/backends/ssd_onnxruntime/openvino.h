//! \file openvino.h
//! The part of OpenVINO's C interface that engine_openvino.cpp uses, declared here so that a compiler alone builds it.
//!
//! Names and signatures are those of openvino/c/*.h (github.com/openvinotoolkit/openvino, src/bindings/c/include). The
//! numbers of element types differ between versions, so the library is loaded by the name of one version only.

#ifndef SSD_OPENVINO_H
#define SSD_OPENVINO_H

#include <cstddef>
#include <cstdint>

namespace ov
{
constexpr char const* kLibrary = "libopenvino_c.so.2640"; //!< 2026.4.0

struct Core;
struct Model;
struct Compiled;
struct Request;
struct Tensor;
struct Port; //!< An input or output of a model.

using Status = int32_t; //!< ov_status_e; 0 = OK

//! ov_element_type_e of 2026.4
enum ElementType : int32_t
{
    kF32 = 4,
    kI32 = 9,
    kU8 = 16,
};

//! ov_shape_t
struct Shape
{
    int64_t rank;
    int64_t* sizes;
};

//! ov_dimension_t, ov_rank_t
struct Dimension
{
    int64_t least;
    int64_t most;
};

//! ov_partial_shape_t
struct PartialShape
{
    Dimension rank;
    Dimension* sizes;
};

//! The functions, in the order in which engine_openvino.cpp looks them up.
struct Api
{
    char const* (*ov_get_last_err_msg)();
    void (*ov_free)(char const*);
    Status (*ov_core_create)(Core**);
    void (*ov_core_free)(Core*);
    Status (*ov_core_read_model_from_memory_buffer)(Core const*, char const*, size_t, Tensor const* weights, Model**);
    Status (*ov_core_compile_model)(Core const*, Model const*, char const* device, size_t strings, Compiled**, ...);
    Status (*ov_model_inputs_size)(Model const*, size_t*);
    Status (*ov_model_const_input_by_index)(Model const*, size_t, Port**);
    Status (*ov_model_reshape_by_port_indexes)(Model const*, size_t const*, PartialShape const*, size_t);
    void (*ov_model_free)(Model*);
    Status (*ov_compiled_model_outputs_size)(Compiled const*, size_t*);
    Status (*ov_compiled_model_output_by_index)(Compiled const*, size_t, Port**);
    Status (*ov_compiled_model_create_infer_request)(Compiled const*, Request**);
    void (*ov_compiled_model_free)(Compiled*);
    Status (*ov_port_get_any_name)(Port const*, char**);
    Status (*ov_port_get_element_type)(Port const*, ElementType*);
    Status (*ov_port_get_partial_shape)(Port const*, PartialShape*);
    void (*ov_output_const_port_free)(Port*);
    void (*ov_partial_shape_free)(PartialShape*);
    Status (*ov_infer_request_get_input_tensor_by_index)(Request const*, size_t, Tensor**);
    Status (*ov_infer_request_get_output_tensor_by_index)(Request const*, size_t, Tensor**);
    Status (*ov_infer_request_infer)(Request*);
    void (*ov_infer_request_free)(Request*);
    Status (*ov_tensor_get_shape)(Tensor const*, Shape*);
    Status (*ov_tensor_get_byte_size)(Tensor const*, size_t*);
    Status (*ov_tensor_data)(Tensor const*, void**);
    void (*ov_tensor_free)(Tensor*);
    void (*ov_shape_free)(Shape*);
};
} // namespace ov

#endif // SSD_OPENVINO_H
