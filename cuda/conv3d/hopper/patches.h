// Convolutions whose stride is their kernel on sm_90a: called by the host side of the family.
#pragma once
#include "effcore/cuda/conv3d.h"

namespace effcore::cuda::conv3d::hopper {

// False where the kernel does not serve it: nothing was launched then.
bool patches(const char* function, const Patches& args, const Launch& launch);

}  // namespace effcore::cuda::conv3d::hopper
