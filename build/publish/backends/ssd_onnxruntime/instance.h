//! \file instance.h
//! What answers requests.

#ifndef SSD_INSTANCE_H
#define SSD_INSTANCE_H

#include "model.h"

//! What answers requests one after the other. Triton never calls one instance twice at once.
//!
//! There may be more instances than runners: the inputs of a request are read while the others run.
class Instance
{
public:
    Instance(Model& model, TRITONBACKEND_ModelInstance* instance);

    //! Answers a request with its result or with its own error, and releases it.
    //! What the client got wrong, or gave up, is no failure in Triton's statistics, where alerts look.
    void execute(TRITONBACKEND_Request* request) noexcept;

private:
    //! Nanoseconds, as Triton's statistics take them.
    struct Times
    {
        uint64_t begun;
        uint64_t computeBegun;
        uint64_t computeEnded;
    };

    struct Copy
    {
        void* to;
        void const* from;
        size_t bytes;
    };

    void run(TRITONBACKEND_Request* request, TRITONBACKEND_Response* response, Times& times);
    void* input(TRITONBACKEND_Request* request, size_t index);
    void* output(TRITONBACKEND_Response* response, size_t index, std::vector<Copy>& copies);

    TRITONBACKEND_ModelInstance* mInstance;
    Model& mModel;
    int64_t mBatch{1}; //!< of the present request
    std::vector<Scratch> mScratch; //!< of every input, then of every output
};

#endif // SSD_INSTANCE_H
