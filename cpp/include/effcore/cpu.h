// What this processor can run, and which instruction set the kernels use.
#pragma once

namespace effcore {

// In ascending order: x86-64-v2 (SSE4.2; the one portable build elsewhere), v3 (AVX2, FMA), v4 (AVX-512), bf16 (v4 and dot
// products of bfloat16), amx (these and tiles of it).
enum class Isa { v2, v3, v4, bf16, amx };

// The best one here, or the one that the environment variable EFFCORE_ISA names, if the machine has it. Decided once.
Isa isa();

// Whether the processor is AMD's: MKL, which torch multiplies with, has other kernels there.
bool is_amd();

// Whether the processor has instructions for products of float16. On one that has not, torch multiplies float16 at 1/20 to 1/60
// of the rate of float32 (Zen 5).
bool multiplies_float16();

// "v2", "v3", "v4", "bf16" or "amx"; "portable" on other processors.
const char* isa_name();

}  // namespace effcore
