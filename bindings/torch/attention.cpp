// The attention family's schemas and its CPU kernels under torch.
#include "bindings/torch/attention.h"

#include "bindings/torch/threads.h"

namespace effcore::binding {
namespace {

struct Cpu {
  static void run(const attention::Forward& args, const Tensor&) { attention::forward(args, threads()); }
  static void run(const attention::SharedForward& args, const Tensor&) { attention::shared_forward(args, threads()); }
  static void run(const attention::SharedBackward& args, const Tensor&) { attention::shared_backward(args, threads()); }
  static void run(const attention::Backward& args, const Tensor&) { attention::backward(args, threads()); }
  static void run(const attention::Decode& args, const Tensor&) { attention::decode(args, threads()); }
  static void run(const attention::DecodeFromProbs& args, const Tensor&) { attention::decode_from_probs(args, threads()); }

  // Two layers that used one SharedScores would have had their gradients added in one slot: wrong, and plausible.
  static void refuse_reused_scores(const std::vector<Tensor>& uses, const Tensor&, const Tensor&) {
    for (const Tensor& use : uses) {
      check(use.scalar_type() == ScalarType::Float && use.is_cpu() && use.numel() == 1, "attention_with_scores_bwd",
            "uses must be float32 scalars on the CPU");
      const float count = *use.const_data_ptr<float>();
      check(count <= 1.0f, "attention_from_scores", "one SharedScores was used by ", count,
            " layers: each serves exactly one (ask attention_with_scores for more consumers)");
    }
  }
};

}  // namespace
}  // namespace effcore::binding

STABLE_TORCH_LIBRARY(effcore, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? first_key, bool causal, float? scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lengths, Tensor? first_key,"
      " bool causal, float? scale, bool accumulate_kv, Tensor? dk_sum=None, Tensor? dv_sum=None)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attention_with_scores(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? first_key, bool causal, float? scale,"
      " int consumers, int keep)"
      " -> (Tensor out, Tensor lse, Tensor probs, Tensor delta, Tensor[] douts, Tensor[] values, Tensor[] uses)");
  m.def(
      "attention_with_scores_bwd(Tensor q, Tensor k, Tensor out, Tensor lse, Tensor probs, Tensor? delta, Tensor[] douts,"
      " Tensor[] values, Tensor[] uses, Tensor? lengths, Tensor? first_key, bool causal, float? scale)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attention_from_scores(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor probs, Tensor delta, Tensor dout_slot,"
      " Tensor value_slot, Tensor use, Tensor? lengths, Tensor? first_key, bool causal, float? scale) -> Tensor out");
  m.def(
      "attention_from_scores_bwd(Tensor dout, Tensor out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor probs,"
      " Tensor? lengths, Tensor? first_key, bool causal, float? scale) -> (Tensor dv, Tensor delta)");
  m.def("share_kv(Tensor k, Tensor v) -> (Tensor k_slot, Tensor v_slot)");
  m.def(
      "attention_shared_kv(Tensor q, Tensor k, Tensor v, Tensor k_slot, Tensor v_slot, Tensor? lengths, Tensor? first_key,"
      " bool causal, float? scale) -> (Tensor out, Tensor lse, Tensor k_next, Tensor v_next)");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? first_key, float? scale, bool return_probs)"
      " -> (Tensor out, Tensor weights, Tensor scales)");
  m.def("decode_from_probs(Tensor weights, Tensor scales, Tensor v, Tensor lengths, Tensor? first_key) -> Tensor out");
}

STABLE_TORCH_LIBRARY_IMPL(effcore, CPU, m) {
  effcore::binding::AttentionOps<effcore::binding::Cpu>::implement(m);
}
