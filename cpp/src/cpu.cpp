// Chooses the instruction set once: what the processor has, lowered by EFFCORE_ISA.
#include "effcore/cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effcore {
namespace {

constexpr const char* names[] = {"v2", "v3", "v4", "bf16", "amx"};

#if defined(__x86_64__)
// The kernel saves the 8 KiB of tile registers only for processes that asked; the request covers every thread of the process.
bool request_amx() {
#if defined(__linux__)
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_tile_data = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_tile_data) == 0;
#else
  return false;
#endif
}

// Of cpuid's leaf 7: bits of edx.
bool has(unsigned features) {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d & features) == features;
}
constexpr unsigned amx_bf16 = 1u << 22, avx512_fp16 = 1u << 23, amx_tile = 1u << 24;

Isa best() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v3")) return Isa::v2;
  if (!__builtin_cpu_supports("x86-64-v4")) return Isa::v3;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::v4;
  return has(amx_bf16 | amx_tile) && request_amx() ? Isa::amx : Isa::bf16;
}
#else
Isa best() {
  return Isa::v2;
}
#endif

Isa choose() {
  const Isa most = best();
  if (const char* wanted = std::getenv("EFFCORE_ISA"))
    for (int level = 0; level <= static_cast<int>(most); ++level)
      if (std::strcmp(wanted, names[level]) == 0) return static_cast<Isa>(level);
  return most;
}

// Asked for when the library is loaded, before any pool has threads.
const Isa chosen = choose();

}  // namespace

Isa isa() {
  return chosen;
}

bool multiplies_float16() {
#if defined(__x86_64__)
  static const bool does = __builtin_cpu_supports("avx512f") && has(avx512_fp16);  // older ones may lack leaf 7
  return does;
#else
  return true;
#endif
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const char* isa_name() {
#if defined(__x86_64__)
  return names[static_cast<int>(chosen)];
#else
  return "portable";
#endif
}

}  // namespace effcore
