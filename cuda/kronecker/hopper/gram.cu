// Tensor map and launch of the kernel for sm_90a.
#include "kronecker/hopper/gram.h"

#include <cstdlib>

#include "common/error.h"
#include "common/tensor_map.h"
#include "kronecker/hopper/gram.cuh"

namespace effcore::cuda::kronecker::hopper {
namespace {

template <class T, int Columns>
void run(const char* function, TiledGramParams& p, cudaStream_t stream) {
  constexpr int most = Columns / block;
  p.items = 0;
  for (int length = (p.gram.dim + block - 1) / block; length > 0; --length) p.items += (length + most - 1) / most;
  constexpr int bytes = Stages<Columns>::shared_bytes;
  check(cudaFuncSetAttribute(tiled_gram_kernel<T, Columns>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  const auto blocks = static_cast<unsigned>(p.gram.groups.max_segments * p.items);
  tiled_gram_kernel<T, Columns><<<blocks, tile_threads, bytes, stream>>>(p);
  check_launch(function);
}

template <class T>
void run_pairs(const char* function, TiledGramParams& p, cudaStream_t stream) {
  p.items = 0;
  for (int length = (p.gram.dim + block - 1) / block; length > 0; --length) p.items += (length + 1) / 2;
  constexpr int bytes = Stages<block>::shared_bytes;
  check(cudaFuncSetAttribute(paired_gram_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  const auto blocks = static_cast<unsigned>(2 * p.gram.groups.max_segments * p.items);
  paired_gram_kernel<T><<<blocks, tile_threads, bytes, stream>>>(p);
  check_launch(function);
}

}  // namespace

bool grouped_gram(const char* function, const GramParams& gram, DType dtype, cudaStream_t stream) {
  if (dtype != DType::bfloat16 && dtype != DType::float16) return false;
  if (gram.groups.tokens == 0 || reinterpret_cast<std::uintptr_t>(gram.x) % 16 != 0 || gram.stride % 8 != 0) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;
  TiledGramParams p{};
  p.gram = gram;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(gram.dim), static_cast<cuuint64_t>(gram.groups.tokens)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(gram.stride) * 2};
  const cuuint32_t box[2] = {64, steps};
  if (!encode_tensor_map(&p.x, dtype, gram.x, size, stride, box)) return false;
  const char* const trial = std::getenv("EFFCORE_GRAM_TRIAL");
  const bool narrow = trial != nullptr && trial[0] == '1';
  if (trial != nullptr && trial[0] == '0') return false;
  if (trial != nullptr && trial[0] == '3') {
    dtype == DType::bfloat16 ? run_pairs<bf16>(function, p, stream) : run_pairs<fp16>(function, p, stream);
    return true;
  }
  if (dtype == DType::bfloat16)
    narrow ? run<bf16, 128>(function, p, stream) : run<bf16, 256>(function, p, stream);
  else
    narrow ? run<fp16, 128>(function, p, stream) : run<fp16, 256>(function, p, stream);
  return true;
}

}  // namespace effcore::cuda::kronecker::hopper
