"""Which operators, and which kernels, each fusion choice uses.

`site` runs each site's operators on their own; `boundary` runs a site's `post` and the next site's `pre` as
one; `paper` splits as arXiv 2512.24880 does (section 4.3; module `paper`); `inductor` is the reference, plain
ATen left to Inductor.
"""

from __future__ import annotations

FUSIONS: dict[str, tuple[str, ...]] = {
    "inductor": (),
    "paper": ("paper_pre", "post", "head"),
    "site": ("pre", "post", "head"),
    "boundary": ("pre", "post_pre", "post", "head"),
}

_MAPPING_BACKWARD = ("partials_kernel", "slopes_kernel", "streams_kernel", "reduce_kernel")
_POST = ("post_forward_kernel", "post_backward_kernel")

KERNELS: dict[str, tuple[str, ...]] = {
    "sinkhorn": ("sinkhorn_forward_kernel", "sinkhorn_backward_kernel"),
    "pre": ("pre_forward_kernel", "partials_kernel", "pre_finish_kernel", *_MAPPING_BACKWARD),
    "head": ("pre_forward_kernel", "partials_kernel", "pre_finish_kernel", *_MAPPING_BACKWARD),
    "paper_pre": (
        "partials_kernel", "paper_affine_kernel", "sinkhorn_forward_kernel", "paper_collapse_kernel",
        *_MAPPING_BACKWARD,
    ),
    "post": _POST,
    "post_pre": (
        "post_pre_forward_kernel", "partials_kernel", "pre_finish_kernel", "post_pre_backward_kernel",
        "mixing_reduce_kernel", "post_backward_kernel", *_MAPPING_BACKWARD,
    ),
}  # fmt: skip
