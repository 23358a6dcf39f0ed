// The products of the cross-shaped convolution on blocks of rows: G W for outputs and for the gradient of the data, and
// dout^T G for the gradient of the weights.
//
// Bound: FLOPs, 2 * taps * channels * columns a row. A block of G is gathered for `chunk` steps of the depth at a time and
// multiplied with all columns at once; its sums stay in the second-level cache until the depth is done.
#include "conv3d_gather.h"

namespace effcore::conv3d::EFFCORE_ISA {
namespace {

// A tile of registers, and of AMX, covers up to so many rows or columns beyond a block; what it computes there is never read.
constexpr std::int64_t overhang = 32;

template <class E>
constexpr bool direct = E::steps == 1;  // operands are packed by plain copies

template <class E>
struct Family {
  using Storage = typename E::Storage;
  using Operand = typename E::Operand;
  using T = typename E::Accumulator;

  // Steps of the depth between two passes over the sums: for SIMD a panel of weights stays in the first-level cache, for
  // tiles the sums' way there and back must hide behind products.
  static constexpr std::int64_t chunk = direct<E> ? E::Tiles::most_steps : 512;
  static constexpr std::int64_t gradient_rows = 128, gradient_chunk = 256;

  static std::int64_t packed_bytes(std::int64_t depth, std::int64_t columns) {
    return simd::packed_elements<E>(depth, columns) * static_cast<std::int64_t>(sizeof(Operand));
  }
  static std::int64_t partial_bytes(std::int64_t columns) {
    return simd::round_up(columns, overhang) * gradient_chunk * static_cast<std::int64_t>(sizeof(T));
  }

  // Blocks of channels and columns whose lines of cache, of the kernels and of the matrix, are all at hand.
  static void arrange(const WeightsJob& job, std::int64_t task) {
    const std::int64_t channels = job.spatial.size[job.channel], columns = job.spatial.size[1 - job.channel];
    const std::int64_t first = task * weight_channels, last = least(first + weight_channels, channels);
    const std::int64_t *spatial_stride = job.spatial.stride, *temporal_stride = job.temporal.stride;
    auto* const rows = static_cast<Storage*>(job.rows);
    for (std::int64_t n0 = 0; n0 < columns; n0 += weight_channels)
      for (std::int64_t c = first; c < last; ++c)
        for (std::int64_t n = n0; n < least(n0 + weight_channels, columns); ++n) {
          const auto* spatial = static_cast<const Storage*>(job.spatial.data) + c * spatial_stride[job.channel] +
                                n * spatial_stride[1 - job.channel];
          const auto* temporal = static_cast<const Storage*>(job.temporal.data) + c * temporal_stride[job.channel] +
                                 n * temporal_stride[1 - job.channel];
          for (std::int64_t i = 0; i < job.tap_count; ++i) {
            const Tap& tap = job.taps[i];
            Storage& to = rows[(i * channels + c) * columns + n];
            if (tap.temporal < 0)
              to = spatial[tap.spatial];
            else if (tap.spatial < 0)
              to = temporal[tap.temporal];
            else
              to = simd::from_float<Storage, T>(simd::to_float(spatial[tap.spatial]) + simd::to_float(temporal[tap.temporal]));
          }
        }
  }

  static void pack(const WeightsJob& job, std::int64_t task) {
    const std::int64_t columns = job.spatial.size[1 - job.channel], depth = job.tap_count * job.spatial.size[job.channel];
    const std::int64_t first = task * pack_depth, rows = least(pack_depth, depth - first);
    E::pack_rows(static_cast<Operand*>(job.packed), simd::depth<E>(depth), first,
                 static_cast<const Storage*>(job.rows) + first * columns, columns, rows, columns, 0, rows);
  }

  static void rows(const RowsJob& job, std::int64_t task) {
    const Gather& g = job.gather;
    const std::int64_t plane = task / job.blocks, first = task % job.blocks * job.block_rows;
    const std::int64_t rows = least(job.block_rows, plane_rows(g) - first), columns = job.to.size[1];
    const std::int64_t depth = simd::depth<E>(g.taps * g.from.size[1]), sums_row = simd::round_up(columns, overhang);

    const auto lay = [&](char* memory, Operand** gathered, T** sums, T** bias) {
      simd::Pieces pieces(memory);
      *gathered = pieces.take<Operand>((rows + overhang) * chunk);
      *sums = pieces.take<T>((rows + overhang) * sums_row);
      *bias = pieces.take<T>(sums_row);
      return pieces.bytes_from(memory);
    };
    Operand* gathered;
    T *sums, *bias;
    lay(static_cast<char*>(scratch::get(scratch::Slot::local, lay(nullptr, &gathered, &sums, &bias))), &gathered, &sums, &bias);

    const Depth live = live_depth(g, plane);
    const std::int64_t begin = live.begin / E::steps * E::steps;
    {
      [[maybe_unused]] const typename E::Session session;
      for (std::int64_t k = begin; k == begin || k < live.end; k += chunk) {
        simd::Product<Operand, T> p;
        p.k = simd::depth<E>(most(0, least(chunk, live.end - k)));
        gather<Storage>(g, plane, first, rows, k, k + p.k, gathered, chunk);
        p.m = rows, p.n = columns;
        p.a = gathered, p.a_row = chunk;
        p.b = static_cast<const Operand*>(job.packed) + k * E::panel, p.b_panel = depth * E::panel;
        p.c = sums, p.c_row = sums_row;
        p.add = k > begin;
        E::multiply(p);
      }
    }

    read_bias(job, bias, columns);
    const std::int64_t* stride = job.to.stride;
    auto* const to = static_cast<Storage*>(job.to.data) + (job.origin[0] + plane * job.to_step[0]) * stride[2];
    Position position(g.grid, first);
    for (std::int64_t r = 0; r < rows; ++r, position.next())
      add_bias(to + position.b * stride[0] + (job.origin[1] + position.h * job.to_step[1]) * stride[3] +
                   (job.origin[2] + position.w * job.to_step[2]) * stride[4],
               sums + r * sums_row, bias, columns);
  }

  static void read_bias(const RowsJob& job, T* bias, std::int64_t columns) {
    for (std::int64_t n = 0; n < columns; ++n)
      bias[n] =
          job.bias == nullptr ? T{0} : simd::to_float(static_cast<const Storage*>(job.bias->data)[n * job.bias->stride[0]]);
  }
  static void add_bias(Storage* to, const T* sums, const T* bias, std::int64_t columns) {
    constexpr int width = simd::width<T>;
    std::int64_t n = 0;
    for (; n + width <= columns; n += width) simd::store_as(to + n, simd::load(sums + n) + simd::load(bias + n));
    for (; n < columns; ++n) to[n] = simd::from_float<Storage, T>(sums[n] + bias[n]);
  }

  static void weights(const WeightGradientJob& job, std::int64_t task) {
    const Gather& g = job.gather;
    const std::int64_t columns = job.dout.size[1], depth = g.taps * g.from.size[1];
    const std::int64_t split = task / job.chunks, k = task % job.chunks * gradient_chunk;
    const std::int64_t width = least(gradient_chunk, depth - k), blocks = g.grid[0] * job.blocks;
    const Run itself{{0, 0, 0}, 1};
    const Gather out{job.dout, {g.grid[0], g.grid[1], g.grid[2]}, {1, 1, 1}, &itself, 1, 1};
    const std::int64_t out_row = simd::round_up(columns, overhang);

    const auto lay = [&](char* memory, Operand** gathered, Operand** packed, Operand** dout, Operand** transposed) {
      simd::Pieces pieces(memory);
      *gathered = pieces.take<Operand>(direct<E> ? 0 : gradient_rows * gradient_chunk);
      *packed = pieces.take<Operand>(gradient_rows * gradient_chunk);
      *dout = pieces.take<Operand>(gradient_rows * out_row);
      *transposed = pieces.take<Operand>(direct<E> ? 0 : E::row_block * out_row);
      return pieces.bytes_from(memory);
    };
    Operand *gathered, *packed, *dout, *transposed;
    lay(static_cast<char*>(scratch::get(scratch::Slot::local, lay(nullptr, &gathered, &packed, &dout, &transposed))), &gathered,
        &packed, &dout, &transposed);
    T* const sums = reinterpret_cast<T*>(job.partial + task * partial_bytes(columns));

    bool add = false;
    [[maybe_unused]] const typename E::Session session;
    for (std::int64_t block = split * blocks / job.splits; block < (split + 1) * blocks / job.splits; ++block) {
      const std::int64_t plane = block / job.blocks, first = block % job.blocks * gradient_rows;
      const std::int64_t rows = least(gradient_rows, plane_rows(g) - first);
      const Depth live = live_depth(g, plane);
      if (k >= live.end || k + width <= live.begin) continue;
      if constexpr (direct<E>) {  // a panel is a narrow block of G
        for (std::int64_t j = 0; j < width; j += E::panel)
          gather<Storage>(g, plane, first, rows, k + j, k + j + E::panel, packed + j * gradient_rows, E::panel);
      } else {
        gather<Storage>(g, plane, first, rows, k, k + width, gathered, gradient_chunk);
        E::pack_rows(packed, gradient_rows, 0, gathered, gradient_chunk, rows, width, 0, rows);
      }
      gather<Storage>(out, plane, first, rows, 0, columns, dout, out_row);
      simd::Product<Operand, T> p;
      p.m = columns, p.n = width, p.k = simd::depth<E>(rows);
      E::set_transposed(p, dout, out_row, rows, columns, transposed);
      p.b = packed, p.b_panel = gradient_rows * E::panel;
      p.c = sums, p.c_row = gradient_chunk;
      p.add = add;
      E::multiply(p);
      add = true;
    }
    if (!add) simd::zero(sums, columns * gradient_chunk);
  }

  static void reduce(const WeightGradientJob& job, std::int64_t task) {
    const std::int64_t channels = job.gather.from.size[1], columns = job.dout.size[1];
    const std::int64_t first = task * weight_channels, last = least(first + weight_channels, channels);
    const std::int64_t partial = partial_bytes(columns) / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t *spatial_stride = job.dspatial.stride, *temporal_stride = job.dtemporal.stride;
    for (std::int64_t n = 0; n < columns; ++n)
      for (std::int64_t i = 0; i < job.gather.taps; ++i)
        for (std::int64_t c = first; c < last; ++c) {
          const std::int64_t k = i * channels + c;
          const T* sums =
              reinterpret_cast<const T*>(job.partial) + k / gradient_chunk * partial + n * gradient_chunk + k % gradient_chunk;
          T sum = 0;
          for (std::int64_t split = 0; split < job.splits; ++split) sum += sums[split * job.chunks * partial];
          const Storage rounded = simd::from_float<Storage, T>(sum);
          const Tap& tap = job.taps[i];
          if (tap.spatial >= 0)
            static_cast<Storage*>(job.dspatial.data)[n * spatial_stride[0] + c * spatial_stride[1] + tap.spatial] = rounded;
          if (tap.temporal >= 0)
            static_cast<Storage*>(job.dtemporal.data)[n * temporal_stride[0] + c * temporal_stride[1] + tap.temporal] = rounded;
        }
  }

  static constexpr Kernels kernels = {E::Tiles::rows, gradient_rows, gradient_chunk, packed_bytes, partial_bytes,
                                      arrange,        pack,          rows,           weights,      reduce};
};

}  // namespace

const Kernels& kernels(DType dtype) {
  return simd::choose<Family>(dtype);
}

}  // namespace effcore::conv3d::EFFCORE_ISA
