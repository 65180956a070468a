"""Find chains whose stream is divided over the ranks of a tensor-parallel mesh.

Sequence parallelism gives each rank some of the tokens. The mHC parameters are the same on every rank, so each rank
computes a part of their gradient, and the parts have to be summed. Nothing in a local tensor says that it is a part of
a whole; what the stream is made of does: `DTensor.to_local()` of a sharded tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ..errors import MHCError
from .fx.dataflow import op_name, tensor_of
from .residual import Findings, MeshLayout, ResidualChain

# Nodes on the way from a stream value back to the tensor that it is the local part of.
_FARTHEST = 16


def find_mesh_layouts(findings: Findings) -> Findings:
    """Return findings whose chains say how their stream lies on a mesh.

    Raises:
        MHCError: a stream is a DTensor whose features are sharded, or whose values are sums yet to be made.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return findings
    return replace(findings, chains=tuple(replace(chain, layout=_layout(chain)) for chain in findings.chains))


def _layout(chain: ResidualChain) -> MeshLayout | None:
    for add in chain.adds:
        whole = _distributed(add.node)
        if whole is not None:
            return _checked(whole, tensor_of(add.node), add.feature_dim, add.location)
        for value in (add.skip, add.branch):
            part = next(_parts(value), None)
            if part is not None:
                return MeshLayout(part.device_mesh, _divided(part), distributed=False)
    return None


def _parts(value: Node) -> Iterator[Any]:
    """Yield the distributed tensors that a value is the local part of, over operations that keep its tokens."""
    node: Node | None = value
    for _ in range(_FARTHEST):
        if node is None:
            return
        if op_name(node) == "to_local":
            found = _distributed(node.args[0])
            if found is not None:
                yield found
            return
        sizes = _shape(node)
        node = next((source for source in node.all_input_nodes if sizes and _shape(source) == sizes), None)


def _shape(node: Node) -> tuple[Any, ...]:
    tensor = tensor_of(node)
    return tuple(tensor.shape) if tensor is not None else ()


def _distributed(node: Any) -> Any:
    """Return a node's example value if it is a DTensor."""
    example = node.meta.get("example_value") if isinstance(node, Node) else None
    return example if isinstance(example, sys.modules["torch.distributed.tensor"].DTensor) else None


def _divided(whole: Any) -> tuple[int, ...]:
    """Return the dimensions of its mesh over which a tensor's values are divided."""
    return tuple(index for index, placement in enumerate(whole.placements) if placement.is_shard())


def _checked(whole: Any, example: Any, feature_dim: int, location: str) -> MeshLayout:
    rank = example.dim()
    for placement in whole.placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim % rank == feature_dim):
            raise MHCError(
                f"the residual stream at {location} is a DTensor placed {tuple(whole.placements)}. Its tokens may be "
                "sharded, its features and unfinished sums may not: give the branch an output layout of Replicate() or "
                "Shard of a token dimension."
            )
    return MeshLayout(whole.device_mesh, _divided(whole), distributed=True)
