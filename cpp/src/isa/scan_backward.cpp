// The backward of the scan family: convolution and scan.
//
// Scan, with g = dout silu(z) and dh[t] the gradient of h[t], from the last token to the first:
//     dh[t] = g[t] C[t] + decay[t + 1] dh[t + 1]          dC[t] = sum over channels of g[t] h[t]
//     d(dt x)[t] = sum over states of B[t] dh[t]           dB[t] = sum over channels of dt[t] x[t] dh[t]
//     q[t] = dh[t] decay[t] h[t - 1]                       dA = sum over tokens of dt[t] q[t]
//     dx = dt d(dt x) + D g                                ddt = x d(dt x) + sum over states of A q
// A piece's states and decays are recomputed from the kept state before it, a vector of channels at a time, so that they stay
// in the second-level cache: one exponential for each (token, channel, state), as in the forward. Sums over tokens are taken
// piece by piece, so that their rounding grows with the number of pieces, not of tokens.
#include "scan_block.h"

namespace effcore::scan::EFFCORE_ISA {
namespace {

constexpr std::int64_t conv_piece = 64;  // tokens in scratch memory at a time

// sums[i] += the sum of the lanes of v[i], for i < n; v has room for whole groups of vectors.
template <class T>
void add_lanes(T* sums, T* v, std::int64_t n) {
  constexpr int group = width<T>;
  for (std::int64_t i = 0; i < n; i += group) {
    Vector<T> x[group];
    for (int j = 0; j < group; ++j) x[j] = simd::load(v + (i + j) * group);
    const Vector<T> total = simd::sum_across<T>(x);
    if (i + group <= n)
      simd::store(sums + i, simd::load(sums + i) + total);
    else
      for (std::int64_t j = i; j < n; ++j) sums[j] += total[j - i];
  }
}

template <class T>
[[gnu::always_inline]] inline void add(T* to, Vector<T> x) {
  simd::store(to, simd::load(to) + x);
}

template <class Storage>
struct Backward {
  using T = typename SumOf<Storage>::type;
  static constexpr std::int64_t pitch = lanes<T>;

  // du = dout act'(u);  dx[t] = sum_k weight[:, k] du[t + K - 1 - k];  dweight[:, k] = sum_t du[t] x[t - K + 1 + k]
  // Last tokens first, so that the du that a piece needs of the next one are there.
  static void conv(const CausalConvBackward& a, const Sequence& s, std::int64_t first, const ConvSums& sums) {
    const CausalConv& f = a.forward;
    const std::int64_t n = simd::least(pitch, f.x.size[2] - first), taps = f.weight.size[1], halo = taps - 1;
    const std::int64_t rows = taps + 1 + 3 * halo + 2 * conv_piece;
    using S = Scratch;
    S scratch(S::bytes<T>(rows * pitch));
    T* const weight = scratch.take<T>(rows * pitch);
    T* const bias = weight + taps * pitch;
    T* const x = bias + pitch;                      // [halo + piece]
    T* const du = x + (halo + conv_piece) * pitch;  // [piece + halo]
    T* const kept = du + (conv_piece + halo) * pitch;
    T *const dweight = static_cast<T*>(sums.dweight) + first, *const dbias = static_cast<T*>(sums.dbias) + first;
    load_parameter<T, Storage>(weight, &f.weight, first, n);
    load_parameter<T, Storage>(bias, f.bias, first, n);
    simd::zero(du, (conv_piece + halo) * pitch);
    const std::int64_t length = s.end - s.begin;
    for (std::int64_t t0 = (simd::most(length, 1) - 1) / conv_piece * conv_piece; t0 >= 0 && length > 0; t0 -= conv_piece) {
      const std::int64_t tokens = simd::least(conv_piece, length - t0);
      if (t0 > 0)
        load_tokens(x, pitch, at<Storage>(f.x, s.row, s.begin + t0 - halo, first), f.x.stride[1], halo, n);
      else if (f.initial_state != nullptr)
        load_tokens(x, pitch, at<Storage>(*f.initial_state, s.index, 0, first), f.initial_state->stride[1], halo, n);
      else
        simd::zero(x, halo * pitch);
      load_tokens(x + halo * pitch, pitch, at<Storage>(f.x, s.row, s.begin + t0, first), f.x.stride[1], tokens, n);
      std::memcpy(kept, du, halo * pitch * sizeof(T));  // the next piece's first rows
      load_tokens(du, pitch, at<Storage>(a.dout, s.row, s.begin + t0, first), a.dout.stride[1], tokens, n);
      std::memcpy(du + tokens * pitch, kept, halo * pitch * sizeof(T));
      for (std::int64_t t = 0; t < tokens && f.silu; ++t)
        for (std::int64_t c = 0; c < pitch; c += width<T>) {
          Vector<T> u = simd::load(bias + c);
          for (std::int64_t k = 0; k < taps; ++k) u += simd::load(weight + k * pitch + c) * simd::load(x + (t + k) * pitch + c);
          const Vector<T> gate = sigmoid<T>(u), slope = gate * (T(1) + u * (T(1) - gate));
          simd::store(du + t * pitch + c, simd::load(du + t * pitch + c) * slope);
        }
      for (std::int64_t c = 0; c < pitch; c += width<T>)
        for (std::int64_t k = 0; k <= taps; ++k) {
          Vector<T> sum{};
          for (std::int64_t t = 0; t < tokens; ++t) {
            const Vector<T> grad = simd::load(du + t * pitch + c);
            sum += k < taps ? grad * simd::load(x + (t + k) * pitch + c) : grad;
          }
          add<T>(k < taps ? dweight + k * sums.channels + c : dbias + c, sum);
        }
      // x is done with: its rows take dx.
      for (std::int64_t t = 0; t < tokens; ++t) transposed(x + t * pitch, weight, du + (t + halo) * pitch, taps);
      store_tokens(at<Storage>(a.dx, s.row, s.begin + t0, first), a.dx.stride[1], x, pitch, tokens, n);
    }
    if (a.dinitial == nullptr) return;
    for (std::int64_t j = 0; j < halo; ++j) transposed(x + j * pitch, weight, du + j * pitch, j + 1);
    store_tokens(at<Storage>(*a.dinitial, s.index, 0, first), a.dinitial->stride[1], x, pitch, halo, n);
  }

  // to = sum over k < taps of weight[k] du[-k]
  static void transposed(T* to, const T* weight, const T* du, std::int64_t taps) {
    for (std::int64_t c = 0; c < pitch; c += width<T>) {
      Vector<T> sum{};
      for (std::int64_t k = 0; k < taps; ++k) sum += simd::load(weight + k * pitch + c) * simd::load(du - k * pitch + c);
      simd::store(to + c, sum);
    }
  }

  static void scan(const ScanBackward& a, const Sequence& s, std::int64_t first, const ScanSums& sums) {
    const Scan& f = a.forward;
    const std::int64_t channels = f.x.size[2], n = simd::least(pitch, channels - first), states = f.A.size[1];
    const std::int64_t piece = f.keep, pairs = piece * states, all_pairs = simd::round_up(pairs, width<T>);
    using S = Scratch;
    S scratch(S::bytes<T>((3 * states + 2 + 5 * piece) * pitch) + 2 * S::bytes<T>(pairs) +
              4 * S::bytes<T>(all_pairs * width<T>) + S::bytes<T>(states * width<T>));
    T* const A = scratch.take<T>((3 * states + 2 + 5 * piece) * pitch);  // in base 2
    T *const start = A + states * pitch, *const dh = start + states * pitch;
    T *const D = dh + states * pitch, *const bias = D + pitch;
    T *const x = bias + pitch, *const dt = x + piece * pitch, *const z = dt + piece * pitch, *const g = z + piece * pitch;
    T* const slope = g + piece * pitch;  // of softplus
    T *const B = scratch.take<T>(pairs), *const C = scratch.take<T>(pairs);
    T *const before = scratch.take<T>(all_pairs * width<T>), *const decays = scratch.take<T>(all_pairs * width<T>);
    T *const dB = scratch.take<T>(all_pairs * width<T>), *const dC = scratch.take<T>(all_pairs * width<T>);
    T* const h = scratch.take<T>(states * width<T>);
    load_parameter<T, Storage>(A, &f.A, first, n, T(simd::log2_e));
    load_parameter<T, Storage>(D, f.D, first, n);
    load_parameter<T, Storage>(bias, f.dt_bias, first, n);
    const std::int64_t state_offset = (s.index * channels + first) * states;
    if (a.dfinal != nullptr)
      load_state(dh, static_cast<const T*>(a.dfinal) + state_offset, n, states);
    else
      simd::zero(dh, states * pitch);
    T *const dA = static_cast<T*>(sums.dA) + first, *const dD = static_cast<T*>(sums.dD) + first,
             *const ddt_bias = static_cast<T*>(sums.ddt_bias) + first;

    const std::int64_t length = s.end - s.begin;
    for (std::int64_t p = (length + piece - 1) / piece - 1; p >= 0; --p) {
      const std::int64_t t0 = s.begin + p * piece, tokens = simd::least(piece, s.end - t0);
      const T* const kept = static_cast<const T*>(f.states) + (s.first_state + p) * states * channels + first;
      load_tokens(start, pitch, kept, channels, states, n);
      load_tokens(x, pitch, at<Storage>(f.x, s.row, t0, first), f.x.stride[1], tokens, n);
      load_tokens(dt, pitch, at<Storage>(f.dt, s.row, t0, first), f.dt.stride[1], tokens, n);
      load_tokens(g, pitch, at<Storage>(a.dout, s.row, t0, first), a.dout.stride[1], tokens, n);
      if (f.z != nullptr) load_tokens(z, pitch, at<Storage>(*f.z, s.row, t0, first), f.z->stride[1], tokens, n);
      load_tokens(B, states, at<Storage>(f.B, s.row, t0, 0), f.B.stride[1], tokens, states);
      load_tokens(C, states, at<Storage>(f.C, s.row, t0, 0), f.C.stride[1], tokens, states);
      simd::zero(dB, all_pairs * width<T>);
      simd::zero(dC, all_pairs * width<T>);
      for (std::int64_t c = 0; c < pitch; c += width<T>) {
        for (std::int64_t j = 0; j < states; ++j) simd::store(h + j * width<T>, simd::load(start + j * pitch + c));
        // Forward again: the state before each token, its decay, and what the gate's gradient needs of y.
        for (std::int64_t t = 0; t < tokens; ++t) {
          const std::int64_t here = t * pitch + c;
          Vector<T> dt_ = simd::load(dt + here) + simd::load(bias + c);
          if (f.softplus) {
            simd::store(slope + here, sigmoid<T>(dt_));
            dt_ = softplus<T>(dt_);
          }
          simd::store(dt + here, dt_);
          const Vector<T> x_ = simd::load(x + here), dtx = dt_ * x_;
          Vector<T> y = simd::load(D + c) * x_;
          for (std::int64_t j = 0; j < states; ++j) {
            const std::int64_t pair = t * states + j;
            const Vector<T> last = simd::load(h + j * width<T>), decay = exp2<T>(dt_ * simd::load(A + j * pitch + c));
            const Vector<T> next = decay * last + dtx * B[pair];
            simd::store(before + pair * width<T>, last);
            simd::store(decays + pair * width<T>, decay);
            simd::store(h + j * width<T>, next);
            y += next * C[pair];
          }
          if (f.z != nullptr) {
            const Vector<T> z_ = simd::load(z + here), gate = sigmoid<T>(z_), dout = simd::load(g + here);
            simd::store(g + here, dout * z_ * gate);
            simd::store(z + here, dout * y * gate * (T(1) + z_ * (T(1) - gate)));
          }
        }
        T* const piece_dA = h;  // the states are not needed any more
        simd::zero(piece_dA, states * width<T>);
        Vector<T> piece_dD{}, piece_bias{};
        for (std::int64_t t = tokens - 1; t >= 0; --t) {
          const std::int64_t here = t * pitch + c;
          const Vector<T> x_ = simd::load(x + here), dt_ = simd::load(dt + here), g_ = simd::load(g + here), dtx = dt_ * x_;
          Vector<T> ddtx{}, along{};
          for (std::int64_t j = 0; j < states; ++j) {
            const std::int64_t pair = t * states + j;
            T* const at_dh = dh + j * pitch + c;
            const Vector<T> dh_ = simd::load(at_dh) + g_ * C[pair], decay = simd::load(decays + pair * width<T>);
            const Vector<T> decayed = decay * simd::load(before + pair * width<T>), q = dh_ * decayed;
            add<T>(dC + pair * width<T>, g_ * (decayed + dtx * B[pair]));
            add<T>(dB + pair * width<T>, dh_ * dtx);
            ddtx += dh_ * B[pair];
            along += q * simd::load(A + j * pitch + c);
            add<T>(piece_dA + j * width<T>, dt_ * q);
            simd::store(at_dh, decay * dh_);
          }
          Vector<T> ddt_ = ddtx * x_ + along * T(simd::ln_2);
          if (f.softplus) ddt_ *= simd::load(slope + here);
          piece_dD += g_ * x_;
          piece_bias += ddt_;
          simd::store(x + here, ddtx * dt_ + g_ * simd::load(D + c));
          simd::store(dt + here, ddt_);
        }
        for (std::int64_t j = 0; j < states; ++j) add<T>(dA + j * sums.channels + c, simd::load(piece_dA + j * width<T>));
        add<T>(dD + c, piece_dD);
        add<T>(ddt_bias + c, piece_bias);
      }
      store_tokens(at<Storage>(a.dx, s.row, t0, first), a.dx.stride[1], x, pitch, tokens, n);
      store_tokens(at<Storage>(a.ddt, s.row, t0, first), a.ddt.stride[1], dt, pitch, tokens, n);
      if (a.dz != nullptr) store_tokens(at<Storage>(*a.dz, s.row, t0, first), a.dz->stride[1], z, pitch, tokens, n);
      const std::int64_t row = (s.row * f.x.size[1] + t0) * states;
      add_lanes(static_cast<T*>(sums.dB) + row, dB, tokens * states);
      add_lanes(static_cast<T*>(sums.dC) + row, dC, tokens * states);
    }
    if (a.dinitial != nullptr) store_state(static_cast<T*>(a.dinitial) + state_offset, dh, n, states);
  }

  static constexpr ScanBackwardKernels table = {pitch, conv, scan};
};

}  // namespace

const ScanBackwardKernels& scan_backward_kernels(DType dtype) {
  switch (dtype) {
    case DType::float64: return Backward<double>::table;
    case DType::bfloat16: return Backward<simd::bfloat16>::table;
    case DType::float16: return Backward<simd::float16>::table;
    default: return Backward<float>::table;
  }
}

}  // namespace effcore::scan::EFFCORE_ISA
