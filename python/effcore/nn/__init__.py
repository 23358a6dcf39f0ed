"""Modules made of the ops.

- :mod:`effcore.nn.faster`: the same convolutional network in less time on a GPU: its stem and narrow convolutions
- :mod:`effcore.nn.conv3d`: 3D convolutions from 2D and 1D parts, with one interface
- :mod:`effcore.nn.low_rank`: linear layers and convolutions kept as small factors
"""

from effcore._lazy import submodules

__getattr__ = submodules(__name__)
