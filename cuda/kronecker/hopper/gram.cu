// Tensor maps and launch of the kernel for sm_90a.
#include "common/error.h"
#include "common/tensor_map.h"
#include "kronecker/hopper/gram.cuh"
#include "kronecker/hopper/gram.h"

namespace effcore::cuda::kronecker::hopper {
namespace {

template <class T>
void run(const char* function, const PairGramParams& p, unsigned blocks, cudaStream_t stream) {
  constexpr int bytes = static_cast<int>(sizeof(PairGramShared));
  check(cudaFuncSetAttribute(pair_gram_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  pair_gram_kernel<T><<<blocks, pair_threads, bytes, stream>>>(p);
  check_launch(function);
}

// [count, rows, rows] in float32, in boxes of 32 x 32.
bool encode_matrices(CUtensorMap* map, float* data, int rows, std::int64_t count) {
  const auto n = static_cast<cuuint64_t>(rows);
  const cuuint64_t size[3] = {n, n, static_cast<cuuint64_t>(count)}, stride[2] = {n * 4, n * n * 4};
  const cuuint32_t box[3] = {quarter, quarter, 1};
  return encode_tensor_map(map, DType::float32, data, size, stride, box);
}

}  // namespace

bool grouped_gram(const char* function, const GramParams& gram, DType dtype, cudaStream_t stream) {
  if (dtype != DType::bfloat16 && dtype != DType::float16) return false;
  if (gram.groups.tokens == 0 || reinterpret_cast<std::uintptr_t>(gram.x) % 16 != 0 || gram.stride % 8 != 0) return false;
  PairGramParams p{};
  p.gram = gram;
  p.pairs = pairs((gram.dim + block - 1) / block);
  p.work = p.pairs * gram.groups.max_segments;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(gram.dim), static_cast<cuuint64_t>(gram.groups.tokens)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(gram.stride) * 2};
  const cuuint32_t box[2] = {sm90::panel_columns, steps};
  if (!encode_tensor_map(&p.x, dtype, gram.x, size, stride, box)) return false;
  const std::int64_t tiles = static_cast<std::int64_t>(gram.groups.max_slots) * gram.tiles;
  if (tiles > 0 && !encode_matrices(&p.partial, gram.partial, block, tiles)) return false;
  p.copies_out = gram.dim % 4 == 0 && encode_matrices(&p.result, gram.result, gram.dim, gram.groups.experts);
  const auto blocks = static_cast<unsigned>(std::min(p.work, device_attribute(cudaDevAttrMultiProcessorCount, function)));
  if (dtype == DType::bfloat16)
    run<bf16>(function, p, blocks, stream);
  else
    run<fp16>(function, p, blocks, stream);
  return true;
}

}  // namespace effcore::cuda::kronecker::hopper
