"""The table of fusion choices: what the operators of a site are in a rewritten graph.

A row is a value of the option `fusion`, beside "auto", which takes one of `CANDIDATES` by `costs.fusion_choice`. Rows
come in the order of the traffic that they save. To add one, write its row here, its operators and kernels, and its cost
in `costs/traffic.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """One fusion choice.

    Attributes:
        name: the value of the option `fusion`.
        pre: the operator, of `ops.OPERATORS`, that opens a site.
        post: the operator that closes a site.
        head: the operator that reads a chain's streams out by learned weights.
        post_pre: the operator that a site's `post` and the next site's `pre` are joined into; None leaves them apart.
        inlined: not operators but their functions of `inlined`, plain ATen for the inner compiler to fuse.
        cost: a key of `costs.traffic.SITE_COSTS`: sympy is not imported before a cost is asked for.
        help: what it does, in a few words, for help texts.
    """

    name: str
    help: str
    cost: str
    pre: str = "pre"
    post: str = "post"
    head: str = "head"
    post_pre: str | None = None
    inlined: bool = False

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of the operators that a graph calls; none if they are inlined."""
        if self.inlined:
            return ()
        joined = (self.post_pre, *(NORMED[name] for name in (self.pre, self.post_pre))) if self.post_pre else ()
        return (self.pre, *joined, self.post, self.head)

    @property
    def kernels(self) -> frozenset[str]:
        """Names of the Triton kernels that its operators may launch."""
        return frozenset(kernel for name in self.operators for kernel in KERNELS[name])


FUSIONS: dict[str, Fusion] = {
    fusion.name: fusion
    for fusion in (
        Fusion("inductor", "plain ATen, fused by Inductor", cost="unfused", inlined=True),
        Fusion("paper", "the paper's separate kernels", cost="paper", pre="paper_pre"),
        Fusion("site", "`pre` and `post`", cost="site"),
        Fusion("boundary", "each `post` joined with the next `pre`", cost="boundary", post_pre="post_pre"),
    )
}

# What `fusion="auto"` chooses from: graphs that differ only in whether `fuse_boundaries` joins operators.
CANDIDATES = ("site", "boundary")

# The halves that a replayed site runs as: what computes an operator's coefficients, and what takes them.
HALVES = {
    "pre": ("measure", "collapse"),
    "post_pre": ("post_measure", "post_collapse"),
    "pre_norm": ("measure", "collapse_norm"),
    "post_pre_norm": ("post_measure", "post_collapse_norm"),
}
# What `fold_norms` makes of an operator whose layer input only a norm reads.
NORMED = {"pre": "pre_norm", "post_pre": "post_pre_norm"}
# With more streams than these, a norm's backward beside them does not fit the registers.
MOST_NORMED_STREAMS = 4

_MEASURE = ("prepare_phi_kernel", "projection_kernel", "coefficients_kernel")
_WALKS = ("gates_kernel", "coefficient_gradients_kernel", "stream_gradients_kernel")
_SITE_BACKWARD = (*_WALKS, "parameter_gradients_kernel")
_BOUNDARY_BACKWARD = (*_WALKS, "last_gradients_kernel")

_NORMED_WALKS = ("norm_gates_kernel", *_WALKS[1:])

# The kernels that each operator and its backward may launch.
KERNELS: dict[str, tuple[str, ...]] = {
    "sinkhorn": ("sinkhorn_forward_kernel", "sinkhorn_backward_kernel"),
    "pre": (*_MEASURE, "collapse_kernel", *_SITE_BACKWARD),
    "measure": _MEASURE,
    "collapse": ("collapse_kernel", *_SITE_BACKWARD),
    "head": (*_MEASURE, "collapse_kernel", *_SITE_BACKWARD),
    "paper_pre": (
        "prepare_phi_kernel", "projection_kernel", "paper_affine_kernel", "sinkhorn_forward_kernel", "collapse_kernel",
        *_SITE_BACKWARD,
    ),
    "post": ("post_forward_kernel", "post_backward_kernel"),
    "post_pre": (*_MEASURE, "collapse_kernel", *_BOUNDARY_BACKWARD),
    "post_measure": _MEASURE,
    "post_collapse": ("collapse_kernel", *_BOUNDARY_BACKWARD),
    "pre_norm": (*_MEASURE, "collapse_norm_kernel", *_NORMED_WALKS, "parameter_gradients_kernel"),
    "collapse_norm": ("collapse_norm_kernel", *_NORMED_WALKS, "parameter_gradients_kernel"),
    "post_pre_norm": (*_MEASURE, "collapse_norm_kernel", *_NORMED_WALKS, "last_gradients_kernel"),
    "post_collapse_norm": ("collapse_norm_kernel", *_NORMED_WALKS, "last_gradients_kernel"),
}  # fmt: skip
