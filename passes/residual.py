"""What the passes hand to each other and to the report: sites, chains and rejections."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch.fx import Node


class Reason(Enum):
    """Why an add stays as it is; the value is the phrase that the report shows."""

    NATIVE_STREAMS = "writes to several streams that the model carries itself"
    NATIVE_DIFFERS = "writes to several streams that the model carries itself, and not as the operators do"
    ATTENTION_SCORES = "adds a bias or a mask to attention scores"
    EMBEDDING = "adds a fixed or looked-up table, such as positions, types or segments"
    BIAS = "adds a learned bias, broadcast over tokens"
    NUMBER = "adds a number, such as a norm's eps"
    NO_FEATURES = "adds values without a feature dimension, such as losses"
    BROADCAST = "adds operands of different shapes"
    NO_MIXING = "nothing between one operand and the other mixes features or tokens"
    ROTATION = "adds a value and its rearranged features, each times a fixed factor (rotary embedding)"
    TOKEN_SHIFT = "blends a token with its neighbor by fixed factors"
    STRAIGHT_THROUGH = "adds a detached difference (a straight-through estimator)"
    WINDOW_SUM = "adds a sum over a window of tokens, written out"
    RECURRENCE = "updates a recurrent state or joins the parts of a scan"
    FEED_THROUGH = "adds a layer's input times a learned weight to what the layer computed from it"
    EXPERTS = "adds outputs of routed and shared experts"
    LINEAR_MAPS = "adds linear maps of one value, such as LoRA's or parallel convolutions"
    PARALLEL = "adds two branches of one value, neither of which is the skip"
    PARTS = "adds parts or per-element functions of one value"
    INDEPENDENT = "neither operand is computed from the other"
    GATE = "the other operand is the skip times a gate"
    REINJECTION = "adds again a value that the stream already holds"
    REVERSIBLE = "couples two streams: the branch reads the other stream alone"
    RESOLUTIONS = "a skip past a change of resolution (U-Net, feature pyramid)"
    SHORTCUT_UNUSED = "a projection beside another path, with no residual stream behind it"
    BRANCH_LOCAL = "feeds only the branch of a residual add with the same skip"
    IN_PLACE_ALIAS = "changes in place a value that is read elsewhere"
    DYNAMIC_WIDTH = "the number of features is not static"
    INSIDE_REGION = "lies inside a higher-order operator that cannot be opened (cond, scan, flex_attention)"
    SHORT_CHAIN = "its chain has fewer sites than min_sites"
    CUT = "a graph break cuts its residual stream"
    NOT_SELECTED = "the sites option leaves it out"


@dataclass(frozen=True)
class Rejection:
    """An add that was looked at and left alone.

    Attributes:
        add: the add's node name in the captured graph.
        location: "file:line  source text" of the add.
        reason: why.
        detail: what in particular, possibly empty.
    """

    add: str
    location: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Site:
    """One rewritten residual add.

    Attributes:
        name: stable dotted name, the prefix of its parameters: "model.layers.0.mhc.self_attn".
        owner: path of the module whose forward holds the add.
        location: "file:line  source text".
        norm: where the block normalizes: "pre", "post" (on the stream, after the add) or "none".
        shape: the stream's shape in the traced call; symbolic sizes are strings.
        dtype: the stream's dtype, such as "float32".
        width: number of features C.
    """

    name: str
    owner: str
    location: str
    norm: str
    shape: tuple[int | str, ...]
    dtype: str
    width: int


@dataclass(frozen=True)
class Chain:
    """A maximal run of sites on one residual stream.

    Attributes:
        sites: in the order in which the stream passes them.
        head: location at which the stream begins and is expanded.
        tail: location of the last site, behind which the stream is collapsed.
    """

    sites: tuple[Site, ...]
    head: str
    tail: str


@dataclass(frozen=True)
class Carrier:
    """One step of the stream between two residual adds, which each stream passes alone.

    Attributes:
        node: the stream value behind the step.
        source: the stream value before it.
        nodes: what computes `node` from `source`, in graph order, `node` last; several where a norm is written out.
        absorbed: those of `nodes` that nothing else reads.
    """

    node: Node
    source: Node
    nodes: tuple[Node, ...]
    absorbed: frozenset[Node]


@dataclass(frozen=True)
class StreamForm:
    """The form of a stream value, as the traced call had it.

    Attributes:
        sizes: its shape; a symbolic size as its name.
        tokens: product of all sizes but the width; a symbolic size counts as it was in the traced call.
        width: number of features C.
        dtype: its dtype.
        device: its device.
    """

    sizes: tuple[int | str, ...]
    tokens: int
    width: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Exit:
    """Where the stream behind an add leaves the graph.

    Attributes:
        position: among the graph's outputs.
        carriers: the steps from the add to the output, in graph order.
    """

    position: int
    carriers: tuple[Carrier, ...]


@dataclass(frozen=True)
class ResidualAdd:
    """A residual add as `find_residuals` sees it in the graph.

    Attributes:
        node: the add.
        position: of the node in the graph.
        form: of the add's result.
        skip: the operand that carries the stream.
        branch: the other operand.
        fork: the stream value that the branch reads, an ancestor of `skip` over carriers; None where the branch
            does not read this stream (a projection shortcut opens it).
        readers: the users of `fork` that lead into the branch: they read the site's layer input.
        feature_dim: the dimension of the add's result that holds features, counted from the front.
        fork_dim: the same for `fork`, which may be a permuted view of the stream.
        carriers: the steps from the chain's previous site to `skip`, in graph order; empty at the chain's head.
        norm: "pre", "post" or "none".
        module_path: paths of the modules around the add, outermost first, each with its `nn_module_stack` key.
        children: the same, for the children of the innermost module whose output the add writes into the stream.
        hosts: the same, for whose forward can hand the site's parameters to the graph: `children`, or where the branch
            calls none, every child of that module that runs in the graph.
        location: "file:line  source text".
        exits: where the stream behind the add leaves the graph, over carriers alone.
    """

    node: Node
    position: int
    form: StreamForm
    skip: Node
    branch: Node
    fork: Node | None
    readers: frozenset[Node]
    feature_dim: int
    fork_dim: int
    carriers: tuple[Carrier, ...]
    norm: str
    module_path: tuple[tuple[str, str], ...]
    children: tuple[tuple[str, str], ...]
    hosts: tuple[tuple[str, str], ...]
    location: str
    exits: tuple[Exit, ...] = ()


@dataclass(frozen=True)
class Entry:
    """Where a stream comes into a graph: a chain's head that is, over carriers, an input of the graph.

    Attributes:
        node: the input's placeholder.
        position: among the graph's inputs.
        carriers: the steps from the input to the chain's head, in graph order.
        form: of the input.
        feature_dim: the dimension of the input that holds features.
    """

    node: Node
    position: int
    carriers: tuple[Carrier, ...]
    form: StreamForm
    feature_dim: int


@dataclass(frozen=True)
class MeshLayout:
    """How a stream lies on the ranks of a tensor-parallel mesh.

    Attributes:
        mesh: the `DeviceMesh`.
        divided: the dimensions of the mesh over which its tokens are divided.
        distributed: the stream is a DTensor; else, each rank's own part of one.
    """

    mesh: Any
    divided: tuple[int, ...]
    distributed: bool


@dataclass(frozen=True)
class ResidualChain:
    """Residual adds joined by carriers, in graph order.

    Attributes:
        adds: its adds.
        head: the value that is expanded.
        head_location: "file:line  source text" of the head.
        entry: the input that the stream comes in by, if the head is one over carriers.
        layout: how the stream lies on a tensor-parallel mesh, if it does.
    """

    adds: tuple[ResidualAdd, ...]
    head: Node
    head_location: str
    entry: Entry | None = None
    layout: MeshLayout | None = None


@dataclass(frozen=True)
class Findings:
    """All that `find_residuals` learned about one graph."""

    chains: tuple[ResidualChain, ...]
    rejections: tuple[Rejection, ...]
