// The family's functions: arguments into kernel parameters, workspace, launches.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention/decode_plan.h"
#include "attention/dispatch.h"
#ifdef EFFCORE_HOPPER
#include "attention/hopper/backward.h"
#endif
#include "common/error.h"

namespace effcore::cuda::attention {
namespace {

constexpr const char* forward_name = "attention";
constexpr const char* shared_name = "attention_from_scores";
constexpr const char* backward_name = "attention_bwd";
constexpr const char* shared_backward_name = "attention_from_scores_bwd";
constexpr const char* decode_name = "decode_attention";
constexpr const char* decode_probs_name = "decode_from_probs";

std::int64_t element_size(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

int to_int(std::int64_t x, const char* function, const char* what) {
  if (x > std::numeric_limits<int>::max() / 2)
    throw std::invalid_argument(std::string("effcore.") + function + ": " + what + " is " + std::to_string(x) +
                                ", more than CUDA kernels take");
  return static_cast<int>(x);
}

Shape shape_of(const Problem& p, const char* function) {
  Shape s{};
  s.batch = to_int(p.batch, function, "the batch size");
  s.heads = to_int(p.heads, function, "the number of heads");
  s.kv_heads = to_int(p.kv_heads, function, "the number of kv heads");
  to_int(p.batch * p.heads * ((std::max(p.queries, p.keys) + 15) / 16), function, "the number of blocks");
  s.queries = to_int(p.queries, function, "the number of queries");
  s.keys = to_int(p.keys, function, "the number of keys");
  s.head_dim = static_cast<int>(p.head_dim);
  s.value_dim = static_cast<int>(p.value_dim);
  s.group = p.kv_heads > 0 ? static_cast<int>(p.heads / p.kv_heads) : 1;
  s.causal = p.causal;
  s.negative = p.scale < 0;
  s.scale = static_cast<float>(std::abs(p.scale));
  s.scale_log2 = std::max(static_cast<float>(std::abs(p.scale) * 1.4426950408889634), std::numeric_limits<float>::min());
  s.lengths = p.lengths;
  s.lengths_stride = p.lengths_stride;
  s.first_key = p.first_key;
  s.first_key_batch = p.first_key_stride[0];
  s.first_key_query = p.first_key_stride[1];
  return s;
}

Tensor4 tensor(const TensorView& view) {
  Tensor4 t;
  t.data = view.data;
  t.columns = static_cast<int>(view.size[3]);
  const std::int64_t size = element_size(view.dtype), wide = 16 / size;
  const auto address = reinterpret_cast<std::uintptr_t>(view.data);
  t.aligned = address % 16 == 0 && t.columns % wide == 0;
  t.paired = address % (2 * size) == 0;
  for (int d = 0; d < 3; ++d) {
    t.stride[d] = view.size[d] > 1 ? view.stride[d] : 0;
    t.aligned = t.aligned && t.stride[d] % wide == 0;
    t.paired = t.paired && t.stride[d] % 2 == 0;
  }
  return t;
}

float* factors_of(const Shape& shape, DType dtype, const void* probs) {
  return dtype == DType::float32 ? probs_factors<float>(shape, probs) : probs_factors<bf16>(shape, probs);
}

cudaStream_t stream_of(const Launch& launch) {
  return static_cast<cudaStream_t>(launch.stream);
}

// Hands out pieces of the workspace; with a null workspace it counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t at = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return memory_ != nullptr ? reinterpret_cast<T*>(memory_ + at) : nullptr;
  }
  std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

// Hopper's product with kept probabilities takes dout times the factors of their rows from here.
void* take_scaled(Workspace& space, const Problem& p) {
  return space.take<char>(p.batch * p.heads * p.queries * p.value_dim * element_size(p.dtype));
}
Tensor4 scaled_tensor(const Problem& p, void* data) {
  Tensor4 t;
  t.data = data;
  t.columns = static_cast<int>(p.value_dim);
  t.stride[2] = p.value_dim, t.stride[1] = p.queries * t.stride[2], t.stride[0] = p.heads * t.stride[1];
  t.aligned = t.paired = true;
  return t;
}

struct PlannedBackward {
  BackwardPlan plan;
  bool on_hopper;
};

struct BackwardWorkspace {
  std::size_t bytes;
  float *delta, *dq_sums;
  int* turns;
  int turn_count;
  char* scores;
  void* scaled;

  BackwardWorkspace(const Problem& p, const PlannedBackward& planned, bool from_probs, void* memory) {
    const BackwardPlan& plan = planned.plan;
    Workspace space(memory);
    const std::int64_t rows = p.batch * p.heads, blocks = (p.queries + plan.queries - 1) / plan.queries;
    delta = space.take<float>(rows * p.queries);
    turns = space.take<int>(rows * blocks + 1);
    turn_count = static_cast<int>(rows * blocks + 1);
    // Where a block of queries meets but one block of keys, the portable kernels' dq never leaves the registers.
    dq_sums = space.take<float>(planned.on_hopper || p.keys > plan.keys ? rows * blocks * plan.dq_elements : 0);
    scores = plan.scores_bytes > 0 ? space.take<char>(plan.scores_bytes) : nullptr;
    scaled = plan.scores_bytes > 0 && from_probs ? take_scaled(space, p) : nullptr;
    bytes = space.used();
  }
};

struct SharedBackwardWorkspace {
  std::size_t bytes;
  int* ticket = nullptr;
  void* scaled = nullptr;

  SharedBackwardWorkspace(const SharedBackward& args, bool served_by_hopper, void* memory) {
    Workspace space(memory);
    if (served_by_hopper && args.probs != nullptr) ticket = space.take<int>(1), scaled = take_scaled(space, args.problem);
    bytes = space.used();
  }
};

struct DecodeWorkspace {
  std::size_t bytes;
  int splits;
  float* partial;
  float2* statistics;

  DecodeWorkspace(const Problem& p, int splits_, void* memory) : splits(splits_) {
    Workspace space(memory);
    const std::int64_t parts = p.batch * p.heads * splits;
    partial = space.take<float>(splits > 1 ? parts * p.value_dim : 0);
    statistics = space.take<float2>(parts);
    bytes = space.used();
  }
};

int splits_of(const Problem& p, const char* function) {
  const Shape s = shape_of(p, function);
  return decode_splits(s, ceil_div(s.group, decode_heads), device_attribute(cudaDevAttrMultiProcessorCount, function));
}

void run_decode(const Problem& p, DecodeParams params, bool from_probs, const TensorView& v, const TensorView& out,
                const Launch& launch, const char* function) {
  if (p.batch * p.heads == 0) return;
  params.shape = shape_of(p, function);
  params.v = tensor(v), params.out = tensor(out);
  const DecodeWorkspace space(p, splits_of(p, function), launch.workspace);
  params.splits = space.splits, params.partial = space.partial, params.statistics = space.statistics;
  dispatch(p, function, [&](auto kernels) { kernels.decode(params, from_probs, function, stream_of(launch)); });
}

// Calls body(hopper::BackwardKernels<T, D>{}) where those serve these tensors; whether it did.
template <class T, int D, class Body>
bool try_hopper_backward(Kernels<T, D>, const Problem& p, const std::vector<const TensorView*>& tensors, const void* probs,
                         const char* function, Body&& body) {
#ifdef EFFCORE_HOPPER
  if constexpr (sizeof(T) == 2 && D <= 128)
    if (on_hopper(function) && hopper::serves_backward(p, tensors, probs != nullptr)) {
      body(hopper::BackwardKernels<T, D>{});
      return true;
    }
#endif
  return false;
}

std::vector<const TensorView*> tensors_of(const Backward& args) {
  std::vector<const TensorView*> tensors{&args.q, &args.k, &args.dq, &args.dk, &args.dv};
  for (const TensorView* sum : {&args.dk_sum, &args.dv_sum})
    if (sum->data != nullptr) tensors.push_back(sum);
  for (int l = 0; l < args.layers; ++l) tensors.push_back(&args.dout[l]), tensors.push_back(&args.v[l]);
  return tensors;
}

std::vector<const TensorView*> tensors_of(const SharedBackward& args) {
  return {&args.q, &args.k, &args.dout, &args.dv};
}

template <class K>
SharedBackwardWorkspace shared_workspace(const SharedBackward& args, K kernels, void* memory) {
  const bool served =
      try_hopper_backward(kernels, args.problem, tensors_of(args), args.probs, shared_backward_name, [](auto) {});
  return {args, served, memory};
}

template <class K>
PlannedBackward backward_plan(const Backward& args, K kernels) {
  PlannedBackward planned{};
  const auto hopper_plan = [&](auto hopper) { planned.plan = hopper.plan(args.problem, args.probs != nullptr, args.layers); };
  planned.on_hopper = try_hopper_backward(kernels, args.problem, tensors_of(args), args.probs, backward_name, hopper_plan);
  if (!planned.on_hopper) planned.plan = kernels.backward_plan(args.probs != nullptr, args.layers, backward_name);
  return planned;
}

}  // namespace

std::size_t workspace_bytes([[maybe_unused]] const Forward& args) {
#ifdef EFFCORE_HOPPER
  if (on_hopper(forward_name)) return static_cast<std::size_t>(hopper::forward_tickets(args.problem)) * sizeof(int);
#endif
  return 0;
}
std::size_t workspace_bytes(const SharedForward&) {
  return on_hopper(shared_name) ? sizeof(int) : 0;
}
std::size_t workspace_bytes(const SharedBackward& args) {
  return dispatch(args.problem, shared_backward_name,
                  [&](auto kernels) { return shared_workspace(args, kernels, nullptr).bytes; });
}
std::size_t workspace_bytes(const Backward& args) {
  return dispatch(args.problem, backward_name, [&](auto kernels) {
    return BackwardWorkspace(args.problem, backward_plan(args, kernels), args.probs != nullptr, nullptr).bytes;
  });
}
std::size_t workspace_bytes(const Decode& args) {
  return DecodeWorkspace(args.problem, splits_of(args.problem, decode_name), nullptr).bytes;
}
std::size_t workspace_bytes(const DecodeFromProbs& args) {
  return DecodeWorkspace(args.problem, splits_of(args.problem, decode_probs_name), nullptr).bytes;
}

void forward(const Forward& args, const Launch& launch) {
  const Problem& p = args.problem;
  const Shape shape = shape_of(p, forward_name);
  const ForwardParams params{shape,
                             {},
                             tensor(args.q),
                             tensor(args.k),
                             tensor(args.v),
                             tensor(args.out),
                             static_cast<float*>(args.lse),
                             nullptr,
                             factors_of(shape, p.dtype, args.probs),
                             static_cast<int*>(launch.workspace)};
  const ProbsParams probs{shape, {}, params.q, params.k, params.lse, args.probs, params.factors};
  dispatch(p, forward_name, [&](auto kernels) {
    if (try_hopper(kernels, forward_name,
                   [&](auto hopper) { return hopper.forward(params, false, args.probs, forward_name, stream_of(launch)); }))
      return;
    kernels.forward(params, false, forward_name, stream_of(launch));
    if (args.probs != nullptr) kernels.probs(probs, forward_name, stream_of(launch));
  });
}

void shared_forward(const SharedForward& args, const Launch& launch) {
  const Problem& p = args.problem;
  const Shape shape = shape_of(p, shared_name);
  const ForwardParams params{shape,
                             {},
                             tensor(args.q),
                             tensor(args.k),
                             tensor(args.v),
                             tensor(args.out),
                             static_cast<float*>(const_cast<void*>(args.lse)),
                             args.probs,
                             factors_of(shape, p.dtype, args.probs),
                             static_cast<int*>(launch.workspace)};
  dispatch(p, shared_name, [&](auto kernels) {
    if (try_hopper(kernels, shared_name, [&](auto hopper) {
          // Up to head_dim 64 P is made again sooner than it is read (H200, length 4096: 0.53 against 0.57 ms).
          const bool reads_probs = args.probs != nullptr && padded_dim(p.head_dim, p.value_dim) > 64;
          return reads_probs ? hopper.forward_probs(params, 1.0f, shared_name, stream_of(launch))
                             : hopper.forward(params, true, nullptr, shared_name, stream_of(launch));
        }))
      return;
    if (args.probs != nullptr)
      kernels.forward_probs(params, shared_name, stream_of(launch));
    else
      kernels.forward(params, true, shared_name, stream_of(launch));
  });
}

void shared_backward(const SharedBackward& args, const Launch& launch) {
  const Problem& p = args.problem;
  const Shape shape = shape_of(p, shared_backward_name);
  DeltaParams delta{};
  delta.shape = shape;
  delta.dout = tensor(args.dout), delta.out = tensor(args.out);
  delta.delta = static_cast<float*>(args.delta);
  BackwardParams params{};
  params.shape = shape;
  params.q = tensor(args.q), params.k = tensor(args.k);
  params.lse = static_cast<const float*>(args.lse);
  params.probs = args.probs;
  params.layers = 1;
  params.dout[0] = delta.dout;
  params.dv = tensor(args.dv);
  params.float_dv = args.dv.dtype == DType::float32;
  params.factors = delta.factors = factors_of(shape, p.dtype, args.probs);
  dispatch(p, shared_backward_name, [&](auto kernels) {
    const SharedBackwardWorkspace space = shared_workspace(args, kernels, launch.workspace);
    const auto take = [&](auto hopper) {
      params.ticket = space.ticket, delta.scaled = space.scaled;
      if (delta.scaled != nullptr) params.dout[0] = scaled_tensor(p, delta.scaled);
      kernels.delta(delta, shared_backward_name, stream_of(launch));
      hopper.values(params, shared_backward_name, stream_of(launch));
    };
    if (try_hopper_backward(kernels, p, tensors_of(args), args.probs, shared_backward_name, take)) return;
    kernels.delta(delta, shared_backward_name, stream_of(launch));
    kernels.shared_backward(params, shared_backward_name, stream_of(launch));
  });
}

void backward(const Backward& args, const Launch& launch) {
  const Problem& p = args.problem;
  if (args.layers > max_layers)
    throw std::invalid_argument("effcore.attention_with_scores_bwd: " + std::to_string(args.layers) +
                                " layers share these scores, but CUDA kernels take " + std::to_string(max_layers));
  const Shape shape = shape_of(p, backward_name);
  dispatch(p, backward_name, [&](auto kernels) {
    const PlannedBackward planned = backward_plan(args, kernels);
    const BackwardPlan& plan = planned.plan;
    const BackwardWorkspace space(p, planned, args.probs != nullptr, launch.workspace);
    DeltaParams delta{};
    delta.shape = shape;
    delta.dout = tensor(args.dout[0]), delta.out = tensor(args.out), delta.dq = tensor(args.dq);
    delta.consumers_delta = static_cast<const float*>(args.consumers_delta);
    delta.delta = space.delta;
    delta.turns = space.turns, delta.turn_count = space.turn_count;
    delta.block_q = plan.queries, delta.block_k = plan.keys;
    delta.factors = factors_of(shape, p.dtype, args.probs), delta.scaled = space.scaled;
    BackwardParams params{};
    params.shape = shape;
    params.q = tensor(args.q), params.k = tensor(args.k);
    params.lse = static_cast<const float*>(args.lse);
    params.delta = space.delta;
    params.probs = args.probs;
    params.factors = delta.factors;
    params.layers = args.layers;
    for (int l = 0; l < args.layers; ++l) params.dout[l] = tensor(args.dout[l]), params.v[l] = tensor(args.v[l]);
    params.dq = tensor(args.dq), params.dk = tensor(args.dk), params.dv = tensor(args.dv);
    params.float_dk = args.dk.dtype == DType::float32, params.float_dv = args.dv.dtype == DType::float32;
    if (args.dk_sum.data != nullptr) params.dk_sum = tensor(args.dk_sum);
    if (args.dv_sum.data != nullptr) params.dv_sum = tensor(args.dv_sum);
    params.dq_sums = space.dq_sums, params.scores = space.scores;
    if (space.scaled != nullptr) params.scaled_dout = scaled_tensor(p, space.scaled);
    params.turns = space.turns;
    params.ticket = space.turns + space.turn_count - 1;
    kernels.delta(delta, backward_name, stream_of(launch));
    const auto take = [&](auto hopper) { hopper.owner(params, backward_name, stream_of(launch)); };
    if (!try_hopper_backward(kernels, p, tensors_of(args), args.probs, backward_name, take))
      kernels.backward(params, plan.compact, backward_name, stream_of(launch));
  });
}

void decode(const Decode& args, const Launch& launch) {
  DecodeParams params{};
  params.q = tensor(args.q), params.k = tensor(args.k);
  params.weights = args.weights, params.scales = static_cast<float*>(args.scales);
  run_decode(args.problem, params, false, args.v, args.out, launch, decode_name);
}

void decode_from_probs(const DecodeFromProbs& args, const Launch& launch) {
  DecodeParams params{};
  params.weights = const_cast<void*>(args.weights);
  params.scales = static_cast<float*>(const_cast<void*>(args.scales));
  run_decode(args.problem, params, true, args.v, args.out, launch, decode_probs_name);
}

const char* path(DType dtype) {
#ifdef EFFCORE_CUDA_SET_CI
  if (dtype != DType::bfloat16) return "none: built with EFFCORE_CUDA_SET=ci";
#endif
  return product_path(dtype);
}

}  // namespace effcore::cuda::attention
