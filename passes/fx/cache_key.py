"""What the compilers' caches have to tell graphs apart by, beside their code.

AOTAutogradCache hashes a graph's code and attributes, but neither its `meta` nor its nodes' (torch 2.11 to 2.15). What
a pass writes there is noted in one attribute.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

ATTRIBUTE = "_mhc_cache_key"


def add_to_cache_key(graph_module: GraphModule, name: str, value: Any) -> None:
    """Have graphs that differ in `value` be told apart; it has to be made of plain Python values."""
    setattr(graph_module, ATTRIBUTE, (*getattr(graph_module, ATTRIBUTE, ()), (name, value)))


def copy_cache_key(graph_module: GraphModule, piece: GraphModule) -> None:
    """Have a piece of a graph be told apart by what tells the whole apart."""
    if hasattr(graph_module, ATTRIBUTE):
        setattr(piece, ATTRIBUTE, getattr(graph_module, ATTRIBUTE))
