// The scan family on the CPU: how the work is cut into tasks, and the sums over tasks. The arithmetic is in isa/.
//
// A task is a sequence and a block of channels. In the backward, sums over tokens (of parameters) and over channels (of B and
// C) meet: tasks are groups of sequences times groups of blocks, each with its own sums, which are then added in order. Groups
// depend on shapes alone, so the bits do not depend on the number of threads.
#include "effcore/scan.h"

#include <algorithm>
#include <cstring>

#include "choose.h"
#include "routing_kernels.h"
#include "scan_kernels.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::scan {
namespace {

const ScanKernels& scan_kernels(DType dtype) {
  EFFCORE_RETURN_VECTORS(scan_kernels, dtype)
}
const ScanBackwardKernels& scan_backward_kernels(DType dtype) {
  EFFCORE_RETURN_VECTORS(scan_backward_kernels, dtype)
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Groups of the backward along either side: enough for some tens of threads where the other side has but one.
constexpr std::int64_t most_groups = 16;

// Groups g of [0, count): [begin(g), begin(g + 1)).
struct Groups {
  std::int64_t count, groups;
  explicit Groups(std::int64_t count) : count(count), groups(std::min(count, most_groups)) {}
  std::int64_t begin(std::int64_t g) const { return g * count / groups; }
};

// Where the sums of all groups lie in shared scratch memory: `groups` times `size` elements of T.
class Sums {
 public:
  Sums(std::int64_t groups, std::int64_t size) : groups(groups), size((size + 15) / 16 * 16) {}
  std::int64_t elements() const { return groups * size; }
  template <class T>
  T* of(std::int64_t group) const {
    return static_cast<T*>(data) + group * size;
  }

  std::int64_t groups, size;
  void* data = nullptr;
};

// to[c, k] = sum over groups of sums[offset + k * pitch + c]
template <class T>
void sum_parameters(void* to_, const Sums& sums, std::int64_t offset, std::int64_t pitch, std::int64_t channels,
                    std::int64_t columns, const Threads& threads) {
  if (to_ == nullptr) return;
  auto* const to = static_cast<T*>(to_);
  threads(channels, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c)
      for (std::int64_t k = 0; k < columns; ++k) {
        T sum = 0;
        for (std::int64_t g = 0; g < sums.groups; ++g) sum += sums.of<T>(g)[offset + k * pitch + c];
        to[c * columns + k] = sum;
      }
  });
}

// to (contiguous, in its own dtype) = sum over groups of `elements` sums
template <class T>
void sum_rows(const TensorView& to, const Sums& sums, std::int64_t offset, std::int64_t elements, const Threads& threads) {
  constexpr std::int64_t span = 4096;
  constexpr DType sum_type = sizeof(T) == 8 ? DType::float64 : DType::float32;
  const routing::RowKernels &store = routing::row_kernels(to.dtype), &add = routing::row_kernels(sum_type);
  const std::int64_t bytes = to.dtype == DType::float64 ? 8 : to.dtype == DType::float32 ? 4 : 2;
  threads(ceil_div(elements, span), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin * span; i < std::min(end * span, elements); i += span) {
      const std::int64_t n = std::min(span, elements - i);
      T* const total = sums.of<T>(0) + offset + i;
      for (std::int64_t g = 1; g < sums.groups; ++g) add.add(total, sums.of<T>(g) + offset + i, n);
      store.store(static_cast<char*>(to.data) + i * bytes, total, n);
    }
  });
}

template <class T>
void conv_backward(const CausalConvBackward& args, const Threads& threads) {
  const CausalConv& f = args.forward;
  const ScanBackwardKernels& kernels = scan_backward_kernels(f.x.dtype);
  const std::int64_t channels = f.x.size[2], taps = f.weight.size[1], blocks = ceil_div(channels, kernels.block);
  const Groups sequence_groups(sequences(f.x, f.offsets));
  const std::int64_t pitch = blocks * kernels.block;
  Sums sums(sequence_groups.groups, (taps + 1) * pitch);
  sums.data = scratch::get(scratch::Slot::shared, sums.elements() * sizeof(T));
  run_tasks(threads, sums.groups * blocks, [&](std::int64_t task) {
    const std::int64_t group = task / blocks, first = task % blocks * kernels.block;
    T* const own = sums.of<T>(group);
    for (std::int64_t k = 0; k <= taps; ++k) std::fill_n(own + k * pitch + first, kernels.block, T{0});
    const ConvSums to{own, own + taps * pitch, pitch};
    for (std::int64_t s = sequence_groups.begin(group); s < sequence_groups.begin(group + 1); ++s)
      kernels.conv(args, sequence(f.x, f.offsets, s, 0), first, to);
  });
  sum_parameters<T>(args.dweight, sums, 0, pitch, channels, taps, threads);
  sum_parameters<T>(args.dbias, sums, taps * pitch, pitch, channels, 1, threads);
}

template <class T>
void scan_backward(const ScanBackward& args, const Threads& threads) {
  const Scan& f = args.forward;
  const ScanBackwardKernels& kernels = scan_backward_kernels(f.x.dtype);
  const std::int64_t channels = f.x.size[2], states = f.A.size[1], rows = f.x.size[0] * f.x.size[1];
  const std::int64_t blocks = ceil_div(channels, kernels.block), pitch = blocks * kernels.block;
  const Groups sequence_groups(sequences(f.x, f.offsets)), block_groups(blocks);
  Sums parameters(sequence_groups.groups, (states + 2) * pitch), inputs(block_groups.groups, 2 * rows * states);
  auto* const memory =
      static_cast<T*>(scratch::get(scratch::Slot::shared, (parameters.elements() + inputs.elements()) * sizeof(T)));
  parameters.data = memory, inputs.data = memory + parameters.elements();
  run_tasks(threads, parameters.groups * inputs.groups, [&](std::int64_t task) {
    const std::int64_t group = task / inputs.groups, lane = task % inputs.groups;
    T *const own = parameters.of<T>(group), *const dB = inputs.of<T>(lane), *const dC = dB + rows * states;
    const ScanSums to{own, own + states * pitch, own + (states + 1) * pitch, dB, dC, pitch};
    const std::int64_t first_sequence = sequence_groups.begin(group), last_sequence = sequence_groups.begin(group + 1);
    const std::int64_t first_block = block_groups.begin(lane), last_block = block_groups.begin(lane + 1);
    for (std::int64_t k = 0; k < states + 2; ++k)
      std::fill(own + k * pitch + first_block * kernels.block, own + k * pitch + last_block * kernels.block, T{0});
    for (std::int64_t i = first_sequence; i < last_sequence; ++i) {
      const Sequence s = sequence(f.x, f.offsets, i, f.keep);
      const std::int64_t begin = (s.row * f.x.size[1] + s.begin) * states, count = (s.end - s.begin) * states;
      std::fill_n(dB + begin, count, T{0});
      std::fill_n(dC + begin, count, T{0});
      for (std::int64_t block = first_block; block < last_block; ++block) kernels.scan(args, s, block * kernels.block, to);
    }
  });
  sum_parameters<T>(args.dA, parameters, 0, pitch, channels, states, threads);
  sum_parameters<T>(args.dD, parameters, states * pitch, pitch, channels, 1, threads);
  sum_parameters<T>(args.ddt_bias, parameters, (states + 1) * pitch, pitch, channels, 1, threads);
  sum_rows<T>(args.dB, inputs, 0, rows * states, threads);
  sum_rows<T>(args.dC, inputs, rows * states, rows * states, threads);
}

void zero(void* data, std::int64_t elements, DType dtype) {
  if (data != nullptr && elements > 0) std::memset(data, 0, elements * (dtype == DType::float64 ? 8 : 4));
}

void zero_rows(const TensorView& t) {
  const std::int64_t elements = t.size[0] * t.size[1] * t.size[2];
  if (elements > 0) std::memset(t.data, 0, elements * (t.dtype == DType::float64 ? 8 : t.dtype == DType::float32 ? 4 : 2));
}

}  // namespace

void causal_conv(const CausalConv& args, const Threads& threads) {
  const ScanKernels& kernels = scan_kernels(args.x.dtype);
  const std::int64_t blocks = ceil_div(args.x.size[2], kernels.block);
  run_tasks(threads, sequences(args.x, args.offsets) * blocks, [&](std::int64_t task) {
    kernels.conv(args, sequence(args.x, args.offsets, task / blocks, 0), task % blocks * kernels.block);
  });
}

void causal_conv_backward(const CausalConvBackward& args, const Threads& threads) {
  const TensorView& x = args.forward.x;
  if (sequences(x, args.forward.offsets) * x.size[2] == 0) {
    zero(args.dweight, x.size[2] * args.forward.weight.size[1], x.dtype);
    zero(args.dbias, x.size[2], x.dtype);
    return;
  }
  x.dtype == DType::float64 ? conv_backward<double>(args, threads) : conv_backward<float>(args, threads);
}

void selective_scan(const Scan& args, const Threads& threads) {
  const ScanKernels& kernels = scan_kernels(args.x.dtype);
  const std::int64_t blocks = ceil_div(args.x.size[2], kernels.block);
  if (args.offsets != nullptr && args.states != nullptr)  // some rows belong to no sequence
    zero(args.states, kept_states(args.x, args.offsets, args.keep) * args.A.size[0] * args.A.size[1], args.x.dtype);
  run_tasks(threads, sequences(args.x, args.offsets) * blocks, [&](std::int64_t task) {
    kernels.scan(args, sequence(args.x, args.offsets, task / blocks, args.keep), task % blocks * kernels.block);
  });
}

void selective_scan_backward(const ScanBackward& args, const Threads& threads) {
  const Scan& f = args.forward;
  if (sequences(f.x, f.offsets) * f.x.size[2] == 0) {
    zero(args.dA, f.x.size[2] * f.A.size[1], f.x.dtype);
    zero(args.dD, f.x.size[2], f.x.dtype);
    zero(args.ddt_bias, f.x.size[2], f.x.dtype);
    zero_rows(args.dB), zero_rows(args.dC);
    return;
  }
  f.x.dtype == DType::float64 ? scan_backward<double>(args, threads) : scan_backward<float>(args, threads);
}

void selective_step(const Step& args, const Threads& threads) {
  const ScanKernels& kernels = scan_kernels(args.x.dtype);
  const std::int64_t blocks = ceil_div(args.x.size[1], kernels.block);
  run_tasks(threads, args.x.size[0] * blocks,
            [&](std::int64_t task) { kernels.step(args, task / blocks, task % blocks * kernels.block); });
}

}  // namespace effcore::scan
