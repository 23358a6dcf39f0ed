// Memory that kernels need for the length of a call. Each thread keeps what it once got, so that a call of a known size
// allocates nothing.
#pragma once
#include <cstddef>
#include <cstdint>

namespace effcore::scratch {

// A thread that calls a kernel is also one of its workers: `shared` holds what all workers of the call read, `local` what
// one worker needs for itself.
enum class Slot { shared, local };

constexpr std::size_t alignment = 64;

// At least `bytes` bytes, not initialised, valid until the same thread asks for the same slot again.
void* get(Slot slot, std::size_t bytes);

}  // namespace effcore::scratch
