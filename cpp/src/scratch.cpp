#include "scratch.h"

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace effcore::scratch {
namespace {

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[2];

}  // namespace

void* get(Slot slot, std::size_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    // A quarter more than asked for: a growing sequence then seldom allocates.
    const std::size_t wanted = (bytes + bytes / 4 + alignment - 1) / alignment * alignment;
    buffer.data = std::aligned_alloc(alignment, wanted);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = wanted;
  }
#if defined(__SANITIZE_ADDRESS__)  // what was not asked for is none of the kernel's
  ASAN_UNPOISON_MEMORY_REGION(buffer.data, bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(buffer.data) + bytes, buffer.bytes - bytes);
#endif
  return buffer.data;
}

}  // namespace effcore::scratch
