// The forward of the scan family: convolution, scan, one step.
//
// Bound of the scan: an exponential for each (token, channel, state), some ten instructions a vector; a block's states and A
// lie in the first-level cache, so that the tokens' rows are all that moves. Bound of the convolution: memory.
#include "scan_block.h"

namespace effcore::scan::EFFCORE_ISA {
namespace {

constexpr std::int64_t piece = 64;  // tokens in scratch memory at a time

template <class Storage>
struct Forward {
  using T = typename SumOf<Storage>::type;
  using FloatOrStorage = std::conditional_t<sizeof(T) == 4, float, Storage>;  // there are no float parameters of doubles
  static constexpr std::int64_t pitch = lanes<T>;

  static void conv(const CausalConv& a, const Sequence& s, std::int64_t first) {
    const std::int64_t n = simd::least(pitch, a.x.size[2] - first), width_ = a.weight.size[1], halo = width_ - 1;
    using S = Scratch;
    S scratch(S::bytes<T>((width_ + 1 + halo + piece) * pitch));
    T* const weight = scratch.take<T>((width_ + 1 + halo + piece) * pitch);
    T* const bias = weight + width_ * pitch;
    T* const rows = bias + pitch;  // [halo + piece]
    load_parameter<T, Storage>(weight, &a.weight, first, n);
    load_parameter<T, Storage>(bias, a.bias, first, n);
    if (a.initial_state != nullptr)
      load_tokens(rows, pitch, at<Storage>(*a.initial_state, s.index, 0, first), a.initial_state->stride[1], halo, n);
    else
      simd::zero(rows, halo * pitch);
    for (std::int64_t t0 = s.begin; t0 < s.end; t0 += piece) {
      const std::int64_t tokens = simd::least(piece, s.end - t0);
      load_tokens(rows + halo * pitch, pitch, at<Storage>(a.x, s.row, t0, first), a.x.stride[1], tokens, n);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t c = 0; c < pitch; c += width<T>) {
          Vector<T> sum = simd::load(bias + c);
          for (std::int64_t k = 0; k < width_; ++k)
            sum += simd::load(weight + k * pitch + c) * simd::load(rows + (t + k) * pitch + c);
          if (a.silu) sum *= sigmoid<T>(sum);
          simd::store(rows + t * pitch + c, sum);  // the oldest token that this one needed; nobody needs it again
        }
      store_tokens(at<Storage>(a.out, s.row, t0, first), a.out.stride[1], rows, pitch, tokens, n);
      if (tokens == piece && t0 + piece < s.end) std::memmove(rows, rows + piece * pitch, halo * pitch * sizeof(T));
    }
  }

  static void scan(const Scan& a, const Sequence& s, std::int64_t first) {
    const std::int64_t n = simd::least(pitch, a.x.size[2] - first), states = a.A.size[1], channels = a.x.size[2];
    const std::int64_t length = a.keep > 0 ? simd::least(a.keep, piece) : piece;
    using S = Scratch;
    S scratch(S::bytes<T>((2 * states + 2 + 3 * length) * pitch) + 2 * S::bytes<T>(length * states));
    T* const A = scratch.take<T>((2 * states + 2 + 3 * length) * pitch);  // in base 2
    T* const h = A + states * pitch;
    T *const D = h + states * pitch, *const bias = D + pitch;
    T *const x = bias + pitch, *const dt = x + length * pitch, *const z = dt + length * pitch;
    T *const B = scratch.take<T>(length * states), *const C = scratch.take<T>(length * states);
    load_parameter<T, Storage>(A, &a.A, first, n, T(simd::log2_e));
    load_parameter<T, Storage>(D, a.D, first, n);
    load_parameter<T, Storage>(bias, a.dt_bias, first, n);
    const std::int64_t state_offset = (s.index * channels + first) * states;
    if (a.initial_state != nullptr)
      load_state(h, static_cast<const T*>(a.initial_state->data) + state_offset, n, states);
    else
      simd::zero(h, states * pitch);
    // Pieces of `length` tokens, except that a kept state ends one.
    for (std::int64_t t0 = s.begin; t0 < s.end;) {
      std::int64_t tokens = simd::least(length, s.end - t0);
      if (a.keep > 0) {
        const std::int64_t passed = (t0 - s.begin) % a.keep;
        tokens = simd::least(tokens, a.keep - passed);
        if (a.states != nullptr && passed == 0) {
          const std::int64_t row = s.first_state + (t0 - s.begin) / a.keep;
          store_tokens(static_cast<T*>(a.states) + row * states * channels + first, channels, h, pitch, states, n);
        }
      }
      load_tokens(x, pitch, at<Storage>(a.x, s.row, t0, first), a.x.stride[1], tokens, n);
      load_tokens(dt, pitch, at<Storage>(a.dt, s.row, t0, first), a.dt.stride[1], tokens, n);
      if (a.z != nullptr) load_tokens(z, pitch, at<Storage>(*a.z, s.row, t0, first), a.z->stride[1], tokens, n);
      load_tokens(B, states, at<Storage>(a.B, s.row, t0, 0), a.B.stride[1], tokens, states);
      load_tokens(C, states, at<Storage>(a.C, s.row, t0, 0), a.C.stride[1], tokens, states);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t c = 0; c < pitch; c += width<T>) {
          Vector<T> dt_ = simd::load(dt + t * pitch + c) + simd::load(bias + c);
          if (a.softplus) dt_ = softplus<T>(dt_);
          const Vector<T> x_ = simd::load(x + t * pitch + c), dtx = dt_ * x_;
          Vector<T> y = simd::load(D + c) * x_;
          for (std::int64_t j = 0; j < states; ++j) {
            T* const at_h = h + j * pitch + c;
            const Vector<T> decay = exp2<T>(dt_ * simd::load(A + j * pitch + c));
            const Vector<T> next = decay * simd::load(at_h) + dtx * B[t * states + j];
            simd::store(at_h, next);
            y += next * C[t * states + j];
          }
          if (a.z != nullptr) {
            const Vector<T> gate = simd::load(z + t * pitch + c);
            y *= gate * sigmoid<T>(gate);
          }
          simd::store(x + t * pitch + c, y);
        }
      store_tokens(at<Storage>(a.out, s.row, t0, first), a.out.stride[1], x, pitch, tokens, n);
      t0 += tokens;
    }
    store_state(static_cast<T*>(a.final_state) + state_offset, h, n, states);
  }

  // Vectors along the states, which lie next to each other in memory: the states are all that a step moves.
  static void step(const Step& a, std::int64_t row, std::int64_t first) {
    const std::int64_t channels = a.x.size[1], states = a.A.size[1], n = simd::least(pitch, channels - first);
    const std::int64_t padded = simd::round_up(states, width<T>);
    using S = Scratch;
    S scratch(S::bytes<T>(5 * pitch) + S::bytes<T>(4 * padded));
    T* const x = scratch.take<T>(5 * pitch);
    T *const dt = x + pitch, *const z = dt + pitch, *const D = z + pitch, *const bias = D + pitch;
    T* const A = scratch.take<T>(4 * padded);
    T *const h = A + padded, *const B = h + padded, *const C = B + padded;
    const auto load_block = [&](T* to, const TensorView& t) {
      simd::load_row(to, static_cast<const Storage*>(t.data) + row * t.stride[0] + first, n, pitch);
    };
    load_block(x, a.x);
    load_block(dt, a.dt);
    if (a.z != nullptr) load_block(z, *a.z);
    load_parameter<T, Storage>(D, a.D, first, n);
    load_parameter<T, Storage>(bias, a.dt_bias, first, n);
    for (std::int64_t c = 0; c < pitch; c += width<T>) {
      Vector<T> dt_ = simd::load(dt + c) + simd::load(bias + c);
      if (a.softplus) dt_ = softplus<T>(dt_);
      simd::store(dt + c, dt_);
    }
    simd::load_row(B, static_cast<const Storage*>(a.B.data) + row * a.B.stride[0], states, padded);
    simd::load_row(C, static_cast<const Storage*>(a.C.data) + row * a.C.stride[0], states, padded);
    const T* from = static_cast<const T*>(a.state.data) + (row * channels + first) * states;
    T* to = static_cast<T*>(a.new_state) + (row * channels + first) * states;
    for (std::int64_t c = 0; c < n; ++c, from += states, to += states) {
      const std::int64_t at_A = (first + c) * a.A.stride[0];
      if (sizeof(T) == 4 && a.A.dtype == DType::float32)
        simd::load_row(A, static_cast<const FloatOrStorage*>(a.A.data) + at_A, states, padded);
      else
        simd::load_row(A, static_cast<const Storage*>(a.A.data) + at_A, states, padded);
      simd::load_row(h, from, states, padded);
      const T dtx = dt[c] * x[c], rate = dt[c] * T(simd::log2_e);
      Vector<T> y{};
      for (std::int64_t j = 0; j < padded; j += width<T>) {
        const Vector<T> next = exp2<T>(simd::load(A + j) * rate) * simd::load(h + j) + simd::load(B + j) * dtx;
        simd::store(h + j, next);
        y += next * simd::load(C + j);
      }
      simd::store_row(to, h, states, T{1});
      x[c] = simd::horizontal_sum<T>(y) + D[c] * x[c];
    }
    if (a.z != nullptr)
      for (std::int64_t c = 0; c < pitch; c += width<T>) {
        const Vector<T> gate = simd::load(z + c);
        simd::store(x + c, simd::load(x + c) * gate * sigmoid<T>(gate));
      }
    simd::store_row(static_cast<Storage*>(a.out.data) + row * a.out.stride[0] + first, x, n, T{1});
  }

  static constexpr ScanKernels table = {pitch, conv, scan, step};
};

}  // namespace

const ScanKernels& scan_kernels(DType dtype) {
  switch (dtype) {
    case DType::float64: return Forward<double>::table;
    case DType::bfloat16: return Forward<simd::bfloat16>::table;
    case DType::float16: return Forward<simd::float16>::table;
    default: return Forward<float>::table;
  }
}

}  // namespace effcore::scan::EFFCORE_ISA
