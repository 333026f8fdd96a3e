//! \file ssd_nms.h
//! The interface of SSDNMS: activate the class scores, decode the boxes, cap, suppress, merge and pad, for a batch.
//!
//! Plain C, without a CUDA or TensorRT type. Two libraries implement it: `ssd_nms_core` on the GPU (all tensors and the
//! workspace are device memory, the stream is a cudaStream_t) and `ssd_nms_reference` on the CPU (all of it host
//! memory, the stream is ignored). No function throws, keeps state between calls but the text of ssdNmsLastError(), or
//! allocates device memory.

#ifndef SSD_NMS_H
#define SSD_NMS_H

#include <stddef.h>
#include <stdint.h>

#define SSD_NMS_VERSION "1.0.0"

#ifdef __cplusplus
extern "C"
{
#endif

#ifndef SSD_NMS_API
#define SSD_NMS_API __attribute__((visibility("default")))
#endif

    typedef enum SsdNmsStatus
    {
        SSD_NMS_OK = 0,
        SSD_NMS_INVALID_PARAMS = 1, //!< A value of SsdNmsParams is out of its range.
        SSD_NMS_INVALID_SHAPE = 2, //!< A dimension or a type is out of its range.
        SSD_NMS_TOO_LARGE = 3, //!< The problem has more candidates than the order's 32-bit index can tell apart.
        SSD_NMS_INVALID_POINTER = 4, //!< A pointer is null or not aligned to 16 bytes.
        SSD_NMS_WORKSPACE_TOO_SMALL = 5, //!< The workspace has fewer bytes than ssdNmsWorkspaceSize() asks for.
        SSD_NMS_LAUNCH_FAILED = 6, //!< CUDA refused a launch; ssdNmsLastError() says why.
    } SsdNmsStatus;

    typedef enum SsdNmsActivation
    {
        SSD_NMS_SOFTMAX = 0,
        SSD_NMS_SIGMOID = 1,
        SSD_NMS_NONE = 2,
    } SsdNmsActivation;

    typedef enum SsdNmsBoxCoding
    {
        SSD_NMS_CENTER_SIZE = 0,
        SSD_NMS_CORNER = 1,
    } SsdNmsBoxCoding;

    typedef enum SsdNmsType
    {
        SSD_NMS_FLOAT32 = 0,
        SSD_NMS_FLOAT16 = 1,
    } SsdNmsType;

    //! What the operator's attributes say.
    typedef struct SsdNmsParams
    {
        float scoreThreshold; //!< 0..1; a candidate's score is above it.
        float iouThreshold; //!< 0..1; an IoU above it suppresses.
        int32_t maxDetections; //!< K, at least 1.
        int32_t topkPerClass; //!< The best candidates of each class that enter NMS; 0: all of them.
        int32_t backgroundClass; //!< Its column of the logits, or -1: there is none.
        int32_t scoreActivation; //!< SsdNmsActivation
        int32_t boxCoding; //!< SsdNmsBoxCoding
        float boxScales[4]; //!< Above 0; the deltas are divided by them.
        int32_t clipBoxes; //!< 0 or 1
        int32_t classAgnostic; //!< 0 or 1
        float lowestScoreThreshold; //!< 0..1; a lower score threshold, attribute or input, acts as this one.
    } SsdNmsParams;

    //! The dimensions and types of one call, or the largest ones of many.
    typedef struct SsdNmsShape
    {
        int32_t batch; //!< B, at least 1.
        int32_t anchors; //!< N, at least 1.
        int32_t classes; //!< C, at least 1, with the background.
        int32_t deltasType; //!< SsdNmsType
        int32_t logitsType; //!< SsdNmsType
        int32_t hasScoreThresholds; //!< 1: SsdNmsTensors::scoreThresholds is given and scoreThreshold is not used.
        int32_t hasIouThresholds; //!< 1: SsdNmsTensors::iouThresholds is given and iouThreshold is not used.
    } SsdNmsShape;

    //! Contiguous tensors, each aligned to 16 bytes.
    typedef struct SsdNmsTensors
    {
        void const* boxDeltas; //!< deltasType [B,N,4]
        void const* classLogits; //!< logitsType [B,N,C]
        float const* anchors; //!< [N,4]: cx, cy, w, h
        float const* scoreThresholds; //!< [B,1], or null
        float const* iouThresholds; //!< [B,1], or null
        int32_t* numDetections; //!< [B,1]
        float* boxes; //!< [B,K,4]: x1, y1, x2, y2
        float* scores; //!< [B,K]
        int32_t* labels; //!< [B,K]: the class without the background, -1 after numDetections
    } SsdNmsTensors;

    //! One line for a status.
    SSD_NMS_API char const* ssdNmsStatusString(SsdNmsStatus status);

    //! Checks parameters and shape before anything is launched.
    //! \param shape may be null: then the parameters are checked alone.
    //! \param message receives name, value and allowed range of what is wrong (cut to messageSize); may be null.
    SSD_NMS_API SsdNmsStatus ssdNmsValidate(
        SsdNmsParams const* params, SsdNmsShape const* shape, char* message, size_t messageSize);

    //! The bytes of workspace that ssdNmsLaunch() needs for this shape, enough also for fewer images or anchors; 0 if
    //! the parameters or the shape are invalid. The reference needs none.
    SSD_NMS_API size_t ssdNmsWorkspaceSize(SsdNmsParams const* params, SsdNmsShape const* shape);

    //! Enqueues the operator: no synchronisation, no allocation, no read-back, so it can be captured in a CUDA graph.
    //! \param workspace is aligned to 16 bytes; its content does not matter before and means nothing after.
    //! \param stream is a cudaStream_t.
    SSD_NMS_API SsdNmsStatus ssdNmsLaunch(SsdNmsParams const* params, SsdNmsShape const* shape,
        SsdNmsTensors const* tensors, void* workspace, size_t workspaceSize, void* stream);

    //! What CUDA said when the last ssdNmsLaunch() of this thread that ended with SSD_NMS_LAUNCH_FAILED was refused:
    //! the kernel and the error; where the library has no code for the device, the device and what there is code for.
    //! \return "" if there was none. The text lives until this thread's next such launch.
    SSD_NMS_API char const* ssdNmsLastError(void);

#ifdef __cplusplus
} // extern "C"
#endif

#endif // SSD_NMS_H
