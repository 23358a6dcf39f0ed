"""A FlowHN block: an attention layer and an SSM layer on the tokens that each is given, and what brings them together.

    y_a = attention layer (x of its tokens)      y_m = SSM layer (x of its tokens)
    u = x + W_f · merge(y_m, y_a)                out = u + W_p · RMSNorm(u)

Both are whole decoder layers (norm, mixer, residual, norm, MLP, residual). Without a split W_f takes both outputs side by side.

With a split each branch works on its tokens of all rows side by side, so that their layers and gradients are views of one
tensor; as W_f works on each token alone, the merge comes behind it, where it is but an index in the sum that follows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from effcore.models.flowhn_cache import BlockStore
from effcore.models.flowhn_config import FlowHNConfig
from effcore.models.flowhn_routes import Part, Route
from effcore.models.layer import heads_first, split_heads
from effcore.ops import attention as attention_ops
from effcore.ops import routing, scan


class Attention(nn.Module):
    """Grouped-query attention without position encoding: the SSM tells the order."""

    def __init__(self, config: FlowHNConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, part: Part, store: BlockStore | None) -> Tensor:
        """[B, K, C] -> [B, K, C]; a token sees those before it that came here, in this pass and in the store."""
        q, k, v = heads_first(*(split_heads(p(x), self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)))
        out = self._alone(q, k, v, part) if store is None else self._with_store(q, k, v, part, store)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _alone(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Among the tokens of this pass."""
        first = None
        if part.packed:
            assert part.offsets is not None and part.rows is not None
            first = part.offsets[part.rows][None]
        return attention_ops.attention(q, k, v, causal=True, first_key=first)

    def _with_store(self, q: Tensor, k: Tensor, v: Tensor, part: Part, store: BlockStore) -> Tensor:
        one = q.shape[2] == 1 and not torch.is_grad_enabled()
        if store.is_static and one and not part.packed:
            return _decode(q, *store.append_one(k, v))
        fresh = not any(store.lengths)
        keys, values = store.append(k, v, part)
        if fresh:  # as given: one pass over a prompt stays differentiable
            return self._alone(q, k, v, part)
        if not part.packed:
            if one:
                lengths = torch.full((q.shape[0],), keys.shape[2], dtype=torch.int32, device=q.device)
                return _decode(q, keys, values, lengths)
            return attention_ops.attention(q, keys, values, causal=True)
        # Rows of their own lengths: queries stand at the right of a padded block, and a row that sends none reads nothing.
        most = max(part.counts)
        slots = store.slots([most - n for n in part.counts], part)
        lengths = torch.tensor([n if new else 0 for n, new in zip(store.lengths, part.counts, strict=True)])
        lengths = lengths.to(q.device, torch.int32)
        padded = q.new_zeros((len(part.counts), q.shape[1], most, q.shape[3]))
        padded[part.rows, :, slots] = q[0].transpose(0, 1)
        if most == 1 and not torch.is_grad_enabled():
            out = _decode(padded, keys, values, lengths)
        else:
            out = attention_ops.attention(padded, keys, values, causal=True, lengths=lengths)
        return out[part.rows, :, slots].transpose(0, 1)[None]


def _decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    out = attention_ops.decode_attention(q, keys, values, lengths)
    assert isinstance(out, Tensor)
    return out


class StateSpace(nn.Module):
    """Mamba-1 with norms on dt, B and C: projection, short convolution, selective scan, gate, projection."""

    def __init__(self, config: FlowHNConfig):
        super().__init__()
        hidden, inner, states, self.rank = config.hidden_size, config.inner_size, config.state_size, config.dt_rank
        self.width, self.sizes = config.conv_width, [self.rank, states, states]
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, self.width))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.dt_norm, self.b_norm, self.c_norm = (nn.RMSNorm(n, config.rms_norm_eps) for n in self.sizes)
        self.dt_proj = nn.Linear(self.rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mamba's own start: A = -(1 ... N), step sizes from 0.001 to 0.1 by softplus(dt_bias)."""
        states = self.A_log.shape[1]
        self.A_log.copy_(torch.arange(1.0, states + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        step = torch.empty_like(self.dt_bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_bias.copy_(torch.expm1(step).log())
        nn.init.uniform_(self.conv_weight, -(self.width**-0.5), self.width**-0.5)
        self.conv_bias.zero_()

    def forward(self, x: Tensor, part: Part, store: BlockStore | None) -> Tensor:
        """[B, K, C] -> [B, K, C]; the state goes on from the store's."""
        projected, z = self.in_proj(x).chunk(2, dim=-1)
        before = None if store is None else store.convolution
        inner = scan.causal_conv1d(
            projected, self.conv_weight, self.conv_bias, activation="silu", initial_state=before, offsets=part.offsets
        )
        dt, B, C = self.x_proj(inner).split(self.sizes, dim=-1)
        dt, B, C = self.dt_norm(dt), self.b_norm(B), self.c_norm(C)
        y, state = scan.selective_scan(
            inner,
            self.dt_proj(dt).to(inner.dtype),
            -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32))),
            B.to(inner.dtype),
            C.to(inner.dtype),
            self.D,
            z,
            self.dt_bias,
            dt_softplus=True,
            initial_state=None if store is None else store.state,
            return_final_state=True,
            offsets=part.offsets,
        )
        if store is not None:
            store.keep(_last_tokens(projected.detach(), self.width, before, part), state.detach())
        return self.out_proj(y)


def _last_tokens(x: Tensor, width: int, before: Tensor | None, part: Part) -> Tensor:
    """The convolution's state after this pass, [rows, width - 1, E]."""
    if not part.packed:
        return scan.convolution_state(x, width, before)
    halo, begin, places = width - 1, 0, []
    for row, count in enumerate(part.counts):  # among the states [row, halo] and behind them the packed tokens
        held = [row * halo + j for j in range(halo)]
        new = [len(part.counts) * halo + begin + j for j in range(count)]
        places += (held + new)[-halo:]
        begin += count
    before = x.new_zeros((len(part.counts), halo, x.shape[2])) if before is None else before
    source = torch.cat([before.flatten(0, 1), x[0]])
    return source[torch.tensor(places, device=x.device)].view(len(part.counts), halo, -1)


class Branch(nn.Module):
    """A decoder layer around a mixer, on some of the tokens."""

    def __init__(self, config: FlowHNConfig, mixer: Attention | StateSpace):
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = mixer
        self.post_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, tokens: Tensor, part: Part, store: BlockStore | None = None) -> Tensor:
        """[B, K, C] -> [B, K, C], the tokens that are this branch's."""
        tokens = tokens + self.mixer(self.input_norm(tokens), part, store)
        return tokens + self.mlp(self.post_norm(tokens))


class FlowHNBlock(GradientCheckpointingLayer):
    """Both branches and their fusion; with ``strategy="sequential"`` the SSM layer and then the attention layer, no fusion."""

    def __init__(self, config: FlowHNConfig):
        super().__init__()
        hidden = config.hidden_size
        self.attention = Branch(config, Attention(config))
        self.ssm = Branch(config, StateSpace(config))
        self.sequential, self.split = config.strategy == "sequential", config.strategy in ("ae", "fa", "fac")
        if not self.sequential:
            self.fuse = nn.Linear(hidden * (2 if config.strategy == "none" else 1), hidden, bias=False)
            self.norm = nn.RMSNorm(hidden, config.rms_norm_eps)
            self.proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden: Tensor, route: Route, store: BlockStore | None = None) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        if self.sequential:
            return self.attention(self.ssm(hidden, route.ssm, store), route.attention, store)
        if not self.split:
            branches = [self.ssm(hidden, route.ssm, store), self.attention(hidden, route.attention, store)]
            fused = self.fuse(torch.cat(branches, dim=-1))
        elif route.order is None:  # all tokens to one of them
            only, part = (self.attention, route.attention) if route.ssm.empty else (self.ssm, route.ssm)
            fused = self.fuse(only(hidden, part, store))
        else:
            fused = self._routed(hidden, route, store)
        hidden = hidden + fused
        return hidden + self.proj(self.norm(hidden))

    def _routed(self, hidden: Tensor, route: Route, store: BlockStore | None) -> Tensor:
        assert route.order is not None and route.inverse is not None
        rows, _, channels = hidden.shape
        sizes = [sum(route.attention.counts), sum(route.ssm.counts)]
        x_a, x_m = routing.permute_tokens(hidden.flatten(0, 1), route.order, route.inverse, sizes)
        branches = [
            branch(x.view(rows, -1, channels), part, store).flatten(0, 1)
            for branch, x, part in ((self.attention, x_a, route.attention), (self.ssm, x_m, route.ssm))
        ]
        (fused,) = routing.permute_tokens(self.fuse(torch.cat(branches)), route.inverse, route.order)
        return fused.view_as(hidden)
