#include "attention/hopper/tensor_map.h"
#include "common/tensor_map.h"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {
namespace {

int size_of(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

// Boxes of `rows` rows of one panel.
template <int Rank>
bool encode(CUtensorMap* map, const void* data, DType dtype, const cuuint64_t (&size)[Rank],
            const cuuint64_t (&stride)[Rank - 1], int rows) {
  cuuint32_t box[Rank];
  for (cuuint32_t& d : box) d = 1;
  box[0] = static_cast<cuuint32_t>(panel_row_bytes / size_of(dtype)), box[1] = static_cast<cuuint32_t>(rows);
  return encode_tensor_map(map, dtype, data, size, stride, box);
}

}  // namespace

bool make_tensor_map(CUtensorMap* map, const attention::Tensor4& t, DType dtype, int batch, int heads, int tokens, int rows) {
  if (!t.aligned || tokens == 0 || heads == 0 || batch == 0) return false;
  const cuuint64_t size[4] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(tokens),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  cuuint64_t stride[3];  // bytes, of tokens, heads, batch; a dimension of size 1 has none of its own
  for (int d = 0; d < 3; ++d) {
    const std::int64_t elements = t.stride[2 - d];
    stride[d] = static_cast<cuuint64_t>((elements > 0 ? elements : t.columns) * size_of(dtype));
    if (elements < 0 || (elements == 0 && size[d + 1] > 1)) return false;
  }
  return encode(map, t.data, dtype, size, stride, rows);
}

bool make_probs_map(CUtensorMap* map, const void* probs, DType dtype, std::int64_t tiles, int box_rows) {
  constexpr int tile = attention::probs_tile;
  static_assert(tile == panel_columns);
  const std::int64_t rows = tiles * tile;
  if (rows == 0 || rows > 0x7fffffff || reinterpret_cast<std::uintptr_t>(probs) % 16 != 0) return false;
  const cuuint64_t size[2] = {tile, static_cast<cuuint64_t>(rows)}, stride[1] = {panel_row_bytes};
  return encode(map, probs, dtype, size, stride, box_rows);
}

}  // namespace effcore::cuda::hopper
