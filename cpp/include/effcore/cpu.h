// What this processor can run, and which instruction set the kernels use.
#pragma once

namespace effcore {

// In ascending order: x86-64-v2 (SSE4.2; the one portable build elsewhere), v3 (AVX2, FMA), v4 (AVX-512), amx (v4 and bf16
// tiles).
enum class Isa { v2, v3, v4, amx };

// The best one here, or the one that the environment variable EFFCORE_ISA names, if the machine has it. Decided once.
Isa isa();

// "v2", "v3", "v4" or "amx"; "portable" on other processors.
const char* isa_name();

}  // namespace effcore
