// Hopper's asynchronous matrix product (wgmma) by inline PTX: what the fused kernel needs of it and no more.
//
// D [64 x N] (+)= A [64 x 16] B [16 x N], by the 128 threads of a warpgroup; A from shared memory or registers, B from shared
// memory. Both lie K-major in tiles of 64 columns of 16 bits: rows of 128 bytes whose 16-byte chunks are swizzled by the row
// (chunk ^ row % 8), eight rows to 1024 bytes. D and a register A have mma.sync's layout, warp w holding rows 16 w to 16 w
// + 15.
#pragma once
#include "common/element.cuh"
#include "common/tile.cuh"

namespace effcore::cuda::wgmma {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define EFFCORE_WGMMA 1
#endif

// A tile's descriptor: address, the stride of 1024 bytes from eight rows to the next, the 128-byte swizzle. 16 columns on are 2
// more.
__device__ __forceinline__ std::uint64_t describe(std::uint32_t address) {
  return static_cast<std::uint64_t>((address & 0x3ffff) >> 4) | std::uint64_t{1} << 16 | std::uint64_t{64} << 32 |
         std::uint64_t{1} << 62;
}

__device__ __forceinline__ void fence() {
#ifdef EFFCORE_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit() {
#ifdef EFFCORE_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// At most `Pending` groups are still under way.
template <int Pending>
__device__ __forceinline__ void wait() {
#ifdef EFFCORE_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
// What asynchronous products write must not be read or moved earlier.
template <int N>
__device__ __forceinline__ void arrived(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Shared memory written by ordinary stores or cp.async, before the tensor cores read it.
__device__ __forceinline__ void publish() {
#ifdef EFFCORE_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define EFFCORE_WGMMA_SHARED_64(type)                                                                                        \
  asm volatile(                                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                            \
      " {"                                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                                    \
      "%32, %33, p, 1, 1, 0, 0;\n}\n"                                                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),          \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),  \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
        "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                      \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define EFFCORE_WGMMA_REGISTERS_64(type)                                                                                     \
  asm volatile(                                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                            \
      " {"                                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                                    \
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),          \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),  \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
        "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                      \
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(static_cast<int>(add)))

#define EFFCORE_WGMMA_SHARED_128(type)                                                                                       \
  asm volatile(                                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                           \
      " {"                                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                     \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                     \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                                    \
      "%64, %65, p, 1, 1, 0, 0;\n}\n"                                                                                        \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),          \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),  \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
        "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), \
        "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                                          \
      : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define EFFCORE_WGMMA_REGISTERS_128(type)                                                                                    \
  asm volatile(                                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                           \
      " {"                                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                     \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                     \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                                    \
      "{%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                                                          \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),          \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]),  \
        "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
        "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), \
        "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
        "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
        "+f"(d[63])                                                                                                          \
      : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(static_cast<int>(add)))

// d += A B, or = where !add. One instruction; N is twice the size of d.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[32], std::uint64_t a, std::uint64_t b, bool add) {
#ifdef EFFCORE_WGMMA
  if constexpr (std::is_same_v<T, bf16>)
    EFFCORE_WGMMA_SHARED_64("bf16");
  else
    EFFCORE_WGMMA_SHARED_64("f16");
#endif
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[64], std::uint64_t a, std::uint64_t b, bool add) {
#ifdef EFFCORE_WGMMA
  if constexpr (std::is_same_v<T, bf16>)
    EFFCORE_WGMMA_SHARED_128("bf16");
  else
    EFFCORE_WGMMA_SHARED_128("f16");
#endif
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[32], const Operand<T>& a, std::uint64_t b, bool add) {
#ifdef EFFCORE_WGMMA
  if constexpr (std::is_same_v<T, bf16>)
    EFFCORE_WGMMA_REGISTERS_64("bf16");
  else
    EFFCORE_WGMMA_REGISTERS_64("f16");
#endif
}
template <class T>
__device__ __forceinline__ void multiply(float (&d)[64], const Operand<T>& a, std::uint64_t b, bool add) {
#ifdef EFFCORE_WGMMA
  if constexpr (std::is_same_v<T, bf16>)
    EFFCORE_WGMMA_REGISTERS_128("bf16");
  else
    EFFCORE_WGMMA_REGISTERS_128("f16");
#endif
}

#undef EFFCORE_WGMMA_SHARED_64
#undef EFFCORE_WGMMA_SHARED_128
#undef EFFCORE_WGMMA_REGISTERS_64
#undef EFFCORE_WGMMA_REGISTERS_128

}  // namespace effcore::cuda::wgmma
