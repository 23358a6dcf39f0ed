"""Differentiable, compile-safe tensor functions over the native kernels: one module a family."""

from effcore._lazy import submodules

__getattr__ = submodules(__name__)
