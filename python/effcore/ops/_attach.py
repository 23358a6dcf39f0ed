"""Attaches autograd formulas to native ops: what the families' ``_<family>_autograd.py`` have in common.

Forward and backward are separate native ops. A formula sits on the forward op's Autograd key, so ``torch.ops.effcore.*`` is
differentiable wherever it is called from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effcore._load import load_torch_ops

load_torch_ops()

below_autograd = torch._C._AutoDispatchBelowAutograd
_library = torch.library.Library("effcore", "IMPL")


def _needs_grad(arguments: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    for a in arguments:
        if isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif isinstance(a, list) and any(isinstance(t, Tensor) and t.requires_grad for t in a):
            return True
    return False


def attach(name: str, apply: Callable[..., Any]) -> Callable[..., Any]:
    """Puts a formula on an op's Autograd key; without a gradient to record the call goes straight to the kernel.

    Returns a function for the public API that takes the same decision without a round trip through the dispatcher and leaves
    tracing to the op itself.
    """
    op = getattr(torch.ops.effcore, name).default

    def autograd(*arguments):
        if _needs_grad(arguments):
            return apply(*arguments)
        with below_autograd():
            return op(*arguments)

    _library.impl(name, autograd, "Autograd")

    def call(*arguments):
        return op(*arguments) if torch.compiler.is_compiling() else autograd(*arguments)

    return call


def refuse_double_backward(name: str) -> Callable[..., Any]:
    """A backward op is not differentiable; without a formula that says so its second derivative would silently be zero."""
    op = getattr(torch.ops.effcore, name).default

    class Refuse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, unflatten, *flat):
            with below_autograd():
                return op(*unflatten(flat))

        @staticmethod
        def backward(ctx: Any, *_):
            raise RuntimeError(f"effcore.{name.removesuffix('_bwd')}: second derivatives are not implemented")

    def apply(*arguments):
        lengths = [len(a) if isinstance(a, list) else None for a in arguments]

        def unflatten(flat):
            it = iter(flat)
            return [next(it) if n is None else [next(it) for _ in range(n)] for n in lengths]

        return Refuse.apply(unflatten, *(t for a in arguments for t in (a if isinstance(a, list) else [a])))

    return apply


def not_differentiable(name: str) -> Callable[..., Any]:
    def apply(*_):
        raise RuntimeError(f"effcore.{name}: not differentiable; call it under torch.no_grad()")

    return apply


def no_gradient(name: str) -> Callable[..., Any]:
    """For ops whose results are integers: like argsort they give no gradient, and say nothing."""
    op = getattr(torch.ops.effcore, name).default

    def apply(*arguments):
        with below_autograd():
            return op(*arguments)

    return apply
