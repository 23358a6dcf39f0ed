"""Differentiable, compile-safe tensor functions over the native kernels: one module a family."""
