"""How a site's phi [rows, n·C] lies in memory: the order of its rows, and which of its two dimensions runs first.

A site whose mixing matrix is stored [in, out] (`transposed`, as DeepSeek-V4 stores it) is the same site with the n·n
last rows of phi and bias in another order, and a model that multiplies by weights [n·C, rows] hands them on as a view.
Kernels read phi where it lies and write its gradient alike: either would be a pass over (n² + 2n)·n·C numbers a call.
The projection is in the order of `res[out, in]` everywhere.

Torch is imported only where it is used: the cost model reads launch configurations without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .manifolds import Manifold


@dataclass(frozen=True)
class PhiLayout:
    """How the phi that a kernel is given lies in memory.

    Attributes:
        transposed: the rows of res, of phi and of bias, are ordered [in, out]. Of a phi without n·n such rows it says
            nothing.
        columns: phi is given as [n·C, rows].
    """

    transposed: bool = False
    columns: bool = False

    def rows(self, phi: Tensor) -> int:
        """Return the number of rows of a phi that lies so."""
        return phi.shape[1 if self.columns else 0]


ROWS_FIRST = PhiLayout()


def in_columns(phi: Tensor) -> bool:
    """Whether a phi [rows, n·C] is a view of contiguous [n·C, rows]."""
    return phi.mT.is_contiguous() and not phi.is_contiguous()


def like_phi(phi: Tensor) -> Tensor:
    """Return memory for the gradient of phi [rows, n·C], which lies as phi does: in columns, or else contiguous."""
    import torch

    if in_columns(phi):
        return torch.empty_like(phi.mT, memory_format=torch.contiguous_format).mT
    return torch.empty_like(phi, memory_format=torch.contiguous_format)


def in_layout(
    call: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    constants: tuple[Any, ...],
    phi_at: int | None,
    gradients: bool = False,
    transposed: bool = False,
) -> Any:
    """Call a kernel with phi as it lies, and the layout that says how as its last constant.

    Args:
        call: the kernel.
        tensors: of the call.
        constants: of the call, as kernels take them.
        phi_at: where phi, scale and bias begin among the tensors, None without.
        gradients: the kernel returns the gradients of phi, scale and bias last.
        transposed: as in `PhiLayout`.
    """
    if phi_at is None:
        return call(*tensors, *constants)
    phi = tensors[phi_at]
    layout = PhiLayout(transposed, in_columns(phi))
    given = (*tensors[:phi_at], phi.mT if layout.columns else phi, *tensors[phi_at + 1 :])
    results = call(*given, *constants, layout)
    if not gradients or not layout.columns:
        return results
    *grads, grad_phi, grad_scale, grad_bias = results
    return (*grads, grad_phi.mT, grad_scale, grad_bias)


def in_kernel_rows(rows: Tensor, family: Manifold, n: int, transposed: bool) -> Tensor:
    """Return a bias or products [*, rows] with those of res ordered [out, in], or put that order back."""
    import torch

    if not transposed or not family.mixes or family.logits is not None:
        return rows
    gates, matrix = rows.split([2 * n, n * n], dim=-1)
    return torch.cat([gates, matrix.unflatten(-1, (n, n)).mT.flatten(-2)], dim=-1)
