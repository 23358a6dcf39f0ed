// The threads of the array module. Under torch the kernels run on torch's pool; here, without torch, on this one.
#pragma once
#include "effcore/threads.h"

namespace effcore::python {

// What the kernels are given: as many workers as set_num_threads asked for.
Threads threads();

// At first: OMP_NUM_THREADS if it is a positive number, else the processors that this process may use.
int num_threads();
void set_num_threads(int count);

}  // namespace effcore::python
