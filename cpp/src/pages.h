// Pages of large results.
#pragma once
#include <cstddef>

namespace effcore {

// Asks for large pages where a result that is about to be written has not been touched yet: fresh memory comes in pages of
// 4 KiB otherwise, and faulting them in, 2 us each on a virtual machine, takes longer than filling them. A hint: where the
// system does not take it nothing changes.
void prefer_large_pages(void* data, std::size_t bytes);

// Faults in the large pages that begin in a result which is about to be written: where two threads meet a page first at the
// same time, both would clear 2 MiB. A zero is written to each of them.
void touch_large_pages(void* data, std::size_t bytes);

}  // namespace effcore
