"""What a Laplace approximation needs of a model: the inputs of some linear layers, and the gradients at their outputs.

A *tap* sits on one layer: a stack of experts' second matrices [E, O, I], or a linear layer (E = 1). During a forward pass it
keeps the tokens' inputs, sorted by expert, and the layer's outputs before the gate weight is applied; gradients at these
outputs come from ``torch.autograd.grad``, so no parameter needs a gradient and one backward pass serves all layers.

transformers keeps experts as one stacked parameter that never goes through a module of its own. Its experts interface takes an
implementation by name; :func:`_experts_forward` is ours, registered while taps are in place.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effcore.errors import InputError, nearest

IMPLEMENTATION = "effcore_laplace"


@dataclass
class Record:
    """One forward pass through one layer: T tokens, sorted by expert."""

    inputs: Tensor  # [T, I]
    outputs: Tensor  # [..., O], part of the graph
    offsets: Tensor  # int32 [E + 1]
    token: Tensor | None  # int64 [T], the token's place among all tokens of the batch; None: unknown
    tokens: int  # all tokens of the batch

    def example(self, examples: int, name: str) -> Tensor:
        """int64 [T]: which of the batch's examples a token belongs to."""
        if self.token is None or self.tokens % examples:
            raise InputError(
                f"effcore.laplace: the inputs of {name} do not show which example a token belongs to: "
                f"{self.tokens} tokens, {examples} examples"
            )
        return self.token // (self.tokens // examples)


class Tap:
    """Listens to one layer."""

    def __init__(self, name: str, module: Any, parameter: str):
        self.name, self.module, self.parameter = name, module, parameter
        weight = self.weight
        self.stacked = weight.dim() == 3
        self.experts = weight.shape[0] if self.stacked else 1
        transposed = self.stacked and bool(getattr(module, "is_transposed", False))
        self.outputs, self.inputs = weight.shape[-2:] if not transposed else (weight.shape[-1], weight.shape[-2])
        self.transposed = transposed
        self.record: Record | None = None

    @property
    def weight(self) -> Tensor:
        return getattr(self.module, self.parameter)

    @property
    def key(self) -> str:
        return f"{self.name}.{self.parameter}"

    def matrices(self) -> Tensor:
        """The weight as [E, O, I], a view."""
        weight = self.weight.detach()
        weight = weight if self.stacked else weight[None]
        return weight.mT if self.transposed else weight

    def keep(self, inputs: Tensor, outputs: Tensor, offsets: Tensor, token: Tensor | None, tokens: int) -> Tensor:
        if self.record is not None:
            raise InputError(f"effcore.laplace: {self.name} runs twice in one forward pass, which is not supported")
        if not outputs.requires_grad:
            outputs = outputs.detach().requires_grad_()
        self.record = Record(inputs.detach(), outputs, offsets, token, tokens)
        return outputs

    def take(self) -> Record:
        if self.record is None:
            raise InputError(f"effcore.laplace: {self.name} took no part in the forward pass")
        record, self.record = self.record, None
        return record


# ---------------------------------------------------------------- finding layers


def _is_stacked(module: Any) -> bool:
    """An experts module that transformers dispatches through its interface."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "_is_expert_parallel")


def find_taps(model: nn.Module, targets: str | Sequence[str]) -> list[Tap]:
    """The layers that ``targets`` names: "experts", "lora", "last", or module names."""
    named = dict(model.named_modules())
    linear = {name: m for name, m in named.items() if isinstance(m, nn.Linear)}
    if not isinstance(targets, str):
        taps = []
        for name in targets:
            if name not in named:
                raise InputError(f"effcore.laplace: targets has {name!r}, no module of the model{nearest(name, named)}")
            module = named[name]
            if not (_is_stacked(module) or isinstance(module, nn.Linear)):
                raise InputError(f"effcore.laplace: {name} is a {type(module).__name__}, neither linear nor experts")
            taps.append(Tap(name, module, "down_proj" if _is_stacked(module) else "weight"))
    elif targets == "experts":
        taps = [Tap(name, m, "down_proj") for name, m in named.items() if _is_stacked(m)]
        second = re.compile(r"(^|\.)experts\.(?:.*\.)?\d+\.(?:.*\.)?(down_proj|w2|fc2|wo|output)$")
        taps += [Tap(name, m, "weight") for name, m in linear.items() if second.search(name)]
        if not taps:
            raise InputError(
                f"effcore.laplace: {type(model).__name__} has no experts: neither stacked ones nor linear layers "
                'under "experts"; targets="last" or a list of module names take other layers'
            )
    elif targets == "lora":
        taps = [Tap(name, m, "weight") for name, m in linear.items() if re.search(r"\.lora_[AB]\.", f".{name}.")]
        if not taps:
            raise InputError(f"effcore.laplace: {type(model).__name__} has no LoRA adapters (lora_A, lora_B)")
    elif targets == "last":
        embeddings: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = embeddings()
        found = [name for name, m in linear.items() if m is head] or list(linear)[-1:]
        if not found:
            raise InputError(f"effcore.laplace: {type(model).__name__} has no linear layer")
        taps = [Tap(found[0], linear[found[0]], "weight")]
    else:
        raise InputError(
            f'effcore.laplace: targets must be "experts", "lora", "last" or a list of module names, got {targets!r}'
            + nearest(targets, ["experts", "lora", "last"])
        )
    if not taps:
        raise InputError("effcore.laplace: targets names no layer")
    return taps


# ---------------------------------------------------------------- listening


@contextlib.contextmanager
def listening(model: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """Taps in place, the model in evaluation mode and without gradients of its parameters; everything is put back."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = {m for m in model.modules() if m.training}
    hooks = []
    previous: Any = None
    stacked = [tap for tap in taps if tap.stacked]
    try:
        for p in wanted:
            p.requires_grad_(False)
        model.eval()
        for tap in taps:
            tap.record = None
            if tap.stacked:
                tap.module._effcore_tap = tap
            else:
                hooks.append(tap.module.register_forward_hook(_linear_hook(tap)))
        if stacked:
            previous = _use_our_experts(stacked)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for tap in stacked:
            del tap.module._effcore_tap
        for config, name in previous or []:
            config._experts_implementation = name
        for p in wanted:
            p.requires_grad_(True)
        for m in training:
            m.training = True
        for tap in taps:
            tap.record = None


def _use_our_experts(taps: Sequence[Tap]) -> list[tuple[Any, Any]]:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    previous = []
    for config in {id(t.module.config): t.module.config for t in taps}.values():
        previous.append((config, config._experts_implementation))
        config._experts_implementation = IMPLEMENTATION
    return previous


def _linear_hook(tap: Tap):
    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = arguments[0].reshape(-1, tap.inputs)
        # Rows of a matrix are examples or, in an expert, tokens from anywhere: then nobody knows whose.
        known = arguments[0].dim() > 2 or re.search(r"(^|\.)experts\.", tap.name) is None
        count = len(inputs)
        token = torch.arange(count, device=inputs.device) if known else None
        offsets = torch.tensor([0, count], dtype=torch.int32, device=inputs.device)
        # A copy goes on: an activation in place would change what the gradients are taken at.
        return tap.keep(inputs, output, offsets, token, count).clone()

    return hook


def _experts_forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts module's forward, expert by expert on sorted tokens: the same sums as transformers' own implementations."""
    tokens, top_k = top_k_index.shape
    expert = top_k_index.reshape(-1)
    order = expert.argsort(stable=True)  # slots beyond the experts (of expert parallelism) come last, and stay 0
    counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts]
    ends = counts.cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends]).int()
    token = order // top_k
    used = int(ends[-1])
    token = token[:used]
    spans = [(e, a, b) for e, (a, b) in enumerate(_pairs(offsets.tolist())) if a < b]

    def linear(x: Tensor, name: str) -> Tensor:
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None) if self.has_bias else None
        if bias is None and _takes_grouped_mm(x, weight):
            return F.grouped_mm(x, weight if self.is_transposed else weight.mT, offs=offsets[1:])
        pieces = []
        for e, a, b in spans:
            matrix = weight[e].mT if self.is_transposed else weight[e]
            pieces.append(F.linear(x[a:b], matrix, None if bias is None else bias[e]))
        return torch.cat(pieces) if pieces else x.new_zeros((0, weight.shape[-1 if self.is_transposed else -2]))

    x = hidden_states[token]
    inner = self._apply_gate(linear(x, "gate_up_proj")) if self.has_gate else self.act_fn(linear(x, "up_proj"))
    out = linear(inner, "down_proj")
    tap = getattr(self, "_effcore_tap", None)
    if tap is not None:
        out = tap.keep(inner, out, offsets, token, tokens)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order[:used], None]
    slots = torch.zeros(tokens * top_k, out.shape[-1], dtype=out.dtype, device=out.device)
    return slots.index_copy(0, order[:used], out).view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


def _takes_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether all experts' products are one call that runs at speed: bfloat16 on a GPU, in rows of whole 16 bytes."""
    whole = weight.is_contiguous() and all(size % 8 == 0 for size in weight.shape[1:])
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and whole


def _pairs(ends: list[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(ends)


# ---------------------------------------------------------------- one batch


@dataclass
class LayerTokens:
    """The tokens of one layer that reach the logits: those whose gradient is not zero.

    Others (padding, positions behind the answer, all but the last position of a last layer) add nothing to the Fisher matrix,
    and would only dilute its Kronecker factors.
    """

    inputs: Tensor  # [T, I]
    gradients: Tensor  # [T, C, O]
    offsets: Tensor  # int32 [E + 1]
    kept: Tensor  # int64 [T], places in the record
    record: Record


def gradients(logits: Tensor, cotangents: Tensor, taps: Sequence[Tap], number: int) -> list[LayerTokens]:
    """Gradients at the taps' outputs of Σ logits · cotangents[c], for each c, in one backward pass a cotangent.

    Args:
        logits: [B, classes] with their graph.
        cotangents: [C, B, classes].
        number: of the batch, for messages.
    """
    records = [tap.take() for tap in taps]
    outputs = [r.outputs for r in records]
    passes: list[list[Tensor | None]] = []
    for c, cotangent in enumerate(cotangents):
        last = c == len(cotangents) - 1
        found = torch.autograd.grad(
            logits, outputs, cotangent.to(logits.dtype), retain_graph=not last, allow_unused=True
        )
        passes.append(list(found))
    layers = []
    for i, (tap, record) in enumerate(zip(taps, records, strict=True)):
        parts: list[Tensor] = []
        for of_layers in passes:
            part, of_layers[i] = of_layers[i], None  # all layers' together would be half of the memory at the peak
            parts.append((torch.zeros_like(record.outputs) if part is None else part).detach())
        g = torch.stack([part.reshape(-1, tap.outputs) for part in parts], 1)
        del part, parts
        if not bool(torch.isfinite(g).all()) or not bool(torch.isfinite(record.inputs).all()):
            raise InputError(f"effcore.laplace: NaN or infinite gradients at {tap.name} in batch {number}")
        active = (g != 0).flatten(1).any(1)
        before = torch.cat([active.new_zeros(1, dtype=torch.long), active.cumsum(0)])
        kept = active.nonzero()[:, 0]
        offsets = before[record.offsets.long()].int()
        layers.append(LayerTokens(record.inputs[kept], g[kept], offsets, kept, record))
    return layers


Batch = Mapping[str, Tensor] | Sequence[Tensor]


def labels_of(batch: Batch) -> Tensor | None:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[1] if len(batch) > 1 else None


def _last_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """int64 [B]: where the last token of each row stands, which no padding hides. None where the inputs do not say."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
    if mask is None and isinstance(ids, Tensor) and ids.dim() == 2:
        return ids.new_full((len(ids),), ids.shape[1] - 1, dtype=torch.long)
    return None


def logits_of(model: nn.Module, batch: Batch, answers: Tensor | None) -> Tensor:
    """[B, classes]: what the model says about a batch. Of a language model, the logits of ``answers`` behind the last token."""
    device = next(model.parameters()).device
    last = places = None  # int64 [B], the last token of each row; int64 [K], ascending: the tokens that have logits
    if isinstance(batch, Mapping):
        inputs: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"
        }
        if hasattr(model, "config") and getattr(model.config, "is_encoder_decoder", None) is not None:
            inputs.setdefault("use_cache", False)
        last = _last_tokens(inputs)
        if answers is not None and last is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
            places = last.unique()
            inputs["logits_to_keep"] = places
        out = model(**inputs)
    else:
        out = model(batch[0].to(device))
    logits = out if isinstance(out, Tensor) else out.logits
    if logits.dim() == 3:
        if answers is None:
            raise InputError(
                f"effcore.laplace: the model gives logits {list(logits.shape)} for each token; "
                "answers= must name the token ids of the classes"
            )
        if int(answers.max()) >= logits.shape[2]:
            raise InputError(
                f"effcore.laplace: answers has token {int(answers.max())} of a vocabulary of {logits.shape[2]}"
            )
        rows = torch.arange(len(logits), device=logits.device)
        if last is None:
            column = torch.full_like(rows, logits.shape[1] - 1)
        elif places is None or len(places) != logits.shape[1]:
            column = last
        else:
            column = torch.searchsorted(places, last)
        logits = logits[rows, column][:, answers.to(logits.device)]
    if logits.dim() != 2:
        raise InputError(f"effcore.laplace: logits must have shape [batch, classes] but have {list(logits.shape)}")
    return logits.float() if logits.dtype != torch.float64 else logits
