// Where a CUDA function runs: in whose stream, with whose memory.
#pragma once
#include <cstddef>

namespace effcore::cuda {

// `workspace` is device memory of at least workspace_bytes(args), aligned to 256 bytes; it may be used again once the stream
// has passed. No function synchronises, allocates or reads memory of the device: all of them can be captured in a graph.
struct Launch {
  void* stream = nullptr;  // cudaStream_t
  void* workspace = nullptr;
};

}  // namespace effcore::cuda
