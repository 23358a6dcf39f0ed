"""The same convolutional network, in less time on a GPU."""

from __future__ import annotations

import contextlib

from torch import nn

from effcore.nn.side_by_side import narrow
from effcore.nn.stem import fuse_stem

__all__ = ["faster"]


def faster(model: nn.Module) -> nn.Module:
    """Gives a model's layers other ways to compute the same, in place, and returns it.

    For channels_last images in half precision on a GPU: a ResNet's stem (:func:`~effcore.nn.stem.fuse_stem`) and convolutions
    of at most 32 channels, as decomposing and merging leave them (:class:`~effcore.nn.side_by_side.NarrowConv2d`). Parameters
    and their names stay. To be called when the layers are as they shall be, before they are compiled.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            narrow(module)
    with contextlib.suppress(ValueError):  # no such stem
        fuse_stem(model)
    return model
