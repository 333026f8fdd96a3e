//! \file numerics.cpp
//! The device functions of numerics.h, compiled for the host and called for many numbers at once.

#include "numerics.h"

using namespace ssd_nms;

extern "C"
{
#define EXPORTED __attribute__((visibility("default")))

    EXPORTED void numericsExp(float const* x, float* y, int64_t count)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            y[i] = expOf(x[i]);
        }
    }

    EXPORTED void numericsFromHalf(uint16_t const* x, float* y, int64_t count)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            y[i] = toFloat(Half{x[i]});
        }
    }

    EXPORTED void numericsOrderedBits(float const* x, uint32_t* y, float* back, int64_t count)
    {
        for (int64_t i = 0; i < count; ++i)
        {
            y[i] = orderedBits(x[i]);
            back[i] = fromOrderedBits(y[i]);
        }
    }

    EXPORTED float numericsLogitBound(float threshold)
    {
        return logitBound(threshold);
    }

    EXPORTED float numericsSigmoid(float logit)
    {
        return sigmoidOf(logit);
    }

    EXPORTED int32_t numericsOverlaps(float const* a, float const* b, float threshold)
    {
        Box const boxA{a[0], a[1], a[2], a[3]};
        Box const boxB{b[0], b[1], b[2], b[3]};
        return overlaps(boxA, areaOf(boxA), boxB, areaOf(boxB), threshold) ? 1 : 0;
    }

    //! \return the key, and what it was made of.
    EXPORTED uint64_t numericsKey(
        float score, int32_t label, int32_t anchor, int32_t anchors, float* scoreBack, uint32_t* indexBack)
    {
        Key const key = makeKey(score, label, anchor, anchors);
        *scoreBack = scoreOf(key);
        *indexBack = indexOf(key);
        return key.value;
    }
}
