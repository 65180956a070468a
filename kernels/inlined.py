"""The operators as plain ATen inside a captured graph, for a compiler to fuse.

The ambient autocast is switched off around them: it would run the projection in bf16, whose error in the row sums is
170 times larger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference


def _in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    # Not the module: a cached graph would import the function from there.
    @functools.wraps(function, assigned=("__name__", "__qualname__", "__doc__"))
    def run(streams: Tensor, *args: Any) -> Any:
        with torch.autocast(device_type=streams.device.type, enabled=False):
            return function(streams, *args)

    return run


pre = _in_full_precision(reference.pre)
products = _in_full_precision(reference.products)
pre_of = _in_full_precision(reference.pre_of)
post = _in_full_precision(reference.post)
post_terms = _in_full_precision(reference.post_terms)
head = _in_full_precision(reference.head)

FUNCTIONS = frozenset({pre, products, pre_of, post, post_terms, head})
