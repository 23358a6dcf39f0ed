// Tensor map and launch of the kernel for sm_90a.
#include "common/error.h"
#include "common/tensor_map.h"
#include "kronecker/hopper/gram.cuh"
#include "kronecker/hopper/gram.h"

namespace effcore::cuda::kronecker::hopper {
namespace {

template <class T>
void run(const char* function, const TiledGramParams& p, unsigned blocks, cudaStream_t stream) {
  check(cudaFuncSetAttribute(tiled_gram_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, tile_shared_bytes), function);
  tiled_gram_kernel<T><<<blocks, tile_threads, tile_shared_bytes, stream>>>(p);
  check_launch(function);
}

}  // namespace

bool grouped_gram(const char* function, const GramParams& gram, unsigned blocks, DType dtype, cudaStream_t stream) {
  if (dtype != DType::bfloat16 && dtype != DType::float16) return false;
  if (gram.groups.tokens == 0 || reinterpret_cast<std::uintptr_t>(gram.x) % 16 != 0 || gram.stride % 8 != 0) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;
  TiledGramParams p{};
  p.gram = gram;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(gram.dim), static_cast<cuuint64_t>(gram.groups.tokens)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(gram.stride) * 2};
  const cuuint32_t box[2] = {64, steps};
  if (!encode_tensor_map(&p.x, dtype, gram.x, size, stride, box)) return false;
  if (dtype == DType::bfloat16)
    run<bf16>(function, p, blocks, stream);
  else
    run<fp16>(function, p, blocks, stream);
  return true;
}

}  // namespace effcore::cuda::kronecker::hopper
