//! \file checks.h
//! What both implementations of ssd_nms.h check and count alike.

#ifndef SSD_NMS_CHECKS_H
#define SSD_NMS_CHECKS_H

#include "ssd_nms.h"

namespace ssd_nms
{

//! Classes without the background.
inline int32_t foregroundClasses(SsdNmsParams const& params, SsdNmsShape const& shape)
{
    return shape.classes - (params.backgroundClass >= 0 ? 1 : 0);
}

//! Everything that a launch needs, but the workspace.
SsdNmsStatus checkCall(SsdNmsParams const* params, SsdNmsShape const* shape, SsdNmsTensors const* tensors);

} // namespace ssd_nms

#endif // SSD_NMS_CHECKS_H
