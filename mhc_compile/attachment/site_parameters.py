"""The parameters of a site (phi, scale, bias): where they live, how they start, what they are called.

They live on the module whose forward holds the add, in a child called `mhc`, one grandchild per site:
`model.layers.0.mhc.self_attn.phi`. So `parameters()`, `state_dict()`, `.to()`, per-block FSDP and copies see them.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..config import MHCConfig
from ..errors import ConfigMismatchError, OwnerError
from ..kernels.manifolds import MANIFOLDS

CHILD = "mhc"
READOUT_SUFFIX = "_readout"

# arXiv 2512.24880, section 5: the gates start small. Zero would be dead for ever, since phi starts at zero too.
_INITIAL_SCALE = 0.01

_OPTIONS_BYTES = 128


class Role(Enum):
    """Where a site lies on its chain; graphs that differ in nothing else are shared by the sites of one role."""

    HEAD = "head"
    CARRIED = "carried"
    TAIL = "tail"
    ONLY = "only"
    READOUT = "readout"

    @property
    def begins(self) -> bool:
        """Whether the stream is expanded before the site."""
        return self in (Role.HEAD, Role.ONLY)

    @property
    def ends(self) -> bool:
        """Whether the stream is read out behind the site."""
        return self in (Role.TAIL, Role.ONLY)


@dataclass(frozen=True)
class SiteShape:
    """What decides the shape and the start of a site's parameters."""

    width: int
    index: int
    device: torch.device
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Start:
    """What decides the values that a site's parameters begin with.

    `init="preserve"`: with phi = 0, pre sums to exactly 1 and leans on stream `index mod n`, post is 1 and every row
    of res sums to 1, so equal streams stay equal to the plain hidden state, whatever the branch. The lean is what
    breaks the symmetry between streams: with a uniform pre they would stay equal for ever, and res would never learn.
    `init="paper"`: the same biases with a random phi.

    Attributes:
        shape: the site's shape and place.
        config: the options.
        readout: the parameters are those of a chain's learned readout; its sigmoid weights start at 1/n each.
    """

    shape: SiteShape
    config: MHCConfig
    readout: bool = False

    def values(self, name: str) -> dict[str, Tensor]:
        """Return phi, scale and bias of the site of this name, on the CPU."""
        n = self.config.n_streams
        bias = self._readout_bias() if self.readout else self._bias()
        columns = n * self.shape.width
        phi = torch.zeros(bias.numel(), columns, device="cpu")
        if self.config.init == "paper":
            # Seeded by torch's seed and the site's name: reproducible, in whatever order sites are made, and without
            # drawing from the user's random stream.
            generator = torch.Generator().manual_seed((torch.initial_seed() + zlib.crc32(name.encode())) % 2**63)
            phi = torch.randn(phi.shape, generator=generator, device="cpu") / math.sqrt(columns)
        scales = 1 if self.readout else MANIFOLDS[self.config.manifold].scales
        scale = torch.full((scales,), _INITIAL_SCALE, dtype=self.shape.dtype, device="cpu")
        return {"phi": phi.to(self.shape.dtype), "scale": scale, "bias": bias.to(self.shape.dtype)}

    def _readout_bias(self) -> Tensor:
        n = self.config.n_streams
        return torch.full((n,), math.log(1.0 / (n - 1)) if n > 1 else 20.0, dtype=torch.float64, device="cpu")

    def _bias(self) -> Tensor:
        manifold, n = MANIFOLDS[self.config.manifold], self.config.n_streams
        weights = _leaning_weights(n, self.shape.index % n)
        if manifold.gated:
            # One stream: sigmoid reaches 1 only in the limit; 20 is exact in float32.
            pre = [_exact_logit(weight) for weight in weights] if n > 1 else [20.0]
            post = [0.0] * n
        else:
            pre, post = weights, [1.0] * n
        parts = [torch.tensor([*pre, *post], dtype=torch.float64, device="cpu")]
        if manifold.mixes:
            with torch.device("cpu"):
                parts.append(manifold.rest_bias(n).double().flatten())
        return torch.cat(parts)


class SiteParameters(nn.Module):
    """The parameters of one site, or of one chain's learned readout.

    Attributes:
        phi: [rows, n·C] projection of a token's streams.
        scale: one factor per group of rows.
        bias: [rows].
        name: the site's dotted name in the model that it was attached to; wrappers around that model do not change it.
        role: where the site lies on its chain, as the whole model showed it: a value of `Role`.
        start: what decides the values that the parameters begin with.
    """

    def __init__(self, name: str, start: Start) -> None:
        """Create the parameters with the values that they begin with."""
        super().__init__()
        self.name = name
        self.role = Role.ONLY.value
        self.start = start
        values = {parameter: value.to(start.shape.device) for parameter, value in start.values(name).items()}
        self.phi = nn.Parameter(values["phi"])
        self.scale = nn.Parameter(values["scale"])
        self.bias = nn.Parameter(values["bias"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the parameters the values that they began with, sharded or not."""
        for parameter, value in self.start.values(self.name).items():
            held = getattr(self, parameter)
            if "torch.distributed.tensor" in sys.modules and isinstance(held, torch.distributed.tensor.DTensor):
                # Every rank computes the whole value: nothing has to be sent.
                value = value.to(dtype=held.dtype, device=held.device_mesh.device_type)
                value = torch.distributed.tensor.distribute_tensor(
                    value, held.device_mesh, held.placements, src_data_rank=None
                )
            held.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SiteParameters:
        """Follow the model to another device, but never below float32.

        Coefficients in bf16 cost 170 to 318 times in the error of the row sums. Parameters that leave the meta device
        hold whatever the memory held before: they are given the values that they begin with.
        """
        empty = self.phi.is_meta

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.element_size() < tensor.element_size():
                return tensor.to(device=moved.device)
            return moved

        super()._apply(keep_precision, recurse)
        if empty and not self.phi.is_meta:
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Load as any module does, but never below float32: given assign=True, what is loaded becomes the parameter."""
        names = [prefix + name for name, _ in self.named_parameters()]
        loaded = {name: state_dict[name] for name in names if name in state_dict}
        short = {name: value.float() for name, value in loaded.items() if value.itemsize < 4}
        super()._load_from_state_dict({**state_dict, **short}, prefix, *args)

    def extra_repr(self) -> str:
        """Show the shape of phi, which tells n and C."""
        return f"phi={tuple(self.phi.shape)}"


class OwnedParameters(nn.Module):
    """The child `mhc` of an owner: its sites' parameters by label.

    Attributes:
        config: the options that made them.
        options: those of them that decide what is computed, as a text.
        on_first_call: a first call made them, which saw no more of the model than it compiled.
    """

    def __init__(self, config: MHCConfig) -> None:
        """Start empty."""
        super().__init__()
        self.config = config
        self.options = config.function_key
        self.on_first_call = False

    def get_extra_state(self) -> Tensor:
        """Return the options that decide what the parameters mean, as a tensor: safetensors holds nothing else."""
        return encoded_options(self.config)

    def set_extra_state(self, state: object) -> None:
        """Compare a checkpoint's options with those attached.

        Where a full checkpoint has none, as a plain model's, `torch.distributed.checkpoint` hands over a mark that it
        puts into the model's own state: there is nothing to compare.

        Raises:
            ConfigMismatchError: the checkpoint was saved under others, so that this would be another model.
        """
        if not isinstance(state, Tensor):
            return
        saved, attached = decoded_options(state), self.config.saved
        differing = [name for name in attached if saved.get(name, attached[name]) != attached[name]]
        if differing:
            was, now = (", ".join(f"{name}={values[name]!r}" for name in differing) for values in (saved, attached))
            raise ConfigMismatchError(
                f"the checkpoint's mHC parameters were trained with {was}, but the model is attached with {now}: it "
                "would be another model. Attach with the checkpoint's options (mhc_compile.detach(model) first, if it "
                "is attached already), or load it with mhc_compile.from_pretrained, which takes them from there."
            )

    def forward(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the input: an owner that runs all its children in turn must not notice this one."""
        return value


def encoded_options(config: MHCConfig) -> Tensor:
    """Return what a checkpoint carries of the options: JSON as uint8, padded to a fixed length for in-place loading."""
    text = json.dumps(config.saved).encode()
    length = -(-len(text) // _OPTIONS_BYTES) * _OPTIONS_BYTES
    return torch.tensor(list(text.ljust(length)), dtype=torch.uint8, device="cpu")


def decoded_options(state: Tensor) -> dict[str, Any]:
    """Return the options that `encoded_options` has written, also where a checkpoint was cast to another dtype."""
    values: dict[str, Any] = json.loads(bytes(state.to(torch.uint8).tolist()))
    return values


def _leaning_weights(n: int, own: int) -> list[float]:
    """Return n weights that sum to 1 and lean on stream `own` by .5 to .75.

    There sigmoid' is about .2; at sigmoid(8) it is 3e-4 and does not learn. Multiples of a power of two make both the
    sum and the products with a hidden state exact, or nearly so.
    """
    other = 0.25 if n <= 3 else 0.125 if n <= 5 else 0.0625
    weights = [other] * n
    weights[own] = 1.0 - other * (n - 1)
    return weights


def _exact_logit(weight: float) -> float:
    """Return a float32 logit whose float32 sigmoid is `weight` itself, if one within 4 units of rounding is.

    The rounded logit misses by a unit as often as not, and then pre does not sum to 1 to the last bit.
    """
    start = torch.tensor(math.log(weight / (1.0 - weight)), dtype=torch.float32, device="cpu")
    steps = torch.tensor([0, -1, 1, -2, 2, -3, 3, -4, 4], dtype=torch.int32, device="cpu")
    near = (start.view(torch.int32) + steps).view(torch.float32)
    # An odd number of copies, so that both paths of a vectorized sigmoid are asked.
    hit = (torch.sigmoid(near[:, None].repeat(1, 67)).double() == weight).all(dim=-1)
    return float(near[int(hit.int().argmax())])


def parameters_of(owner: nn.Module) -> OwnedParameters | None:
    """Return an owner's `mhc` child, if it has one of ours: the active adapter's, where peft keeps several."""
    child = owner._modules.get(CHILD)
    if child is not None and "modules_to_save" in child._modules:
        child = _active_copy(child)
    return child if isinstance(child, OwnedParameters) else None


def _active_copy(wrapper: Any) -> nn.Module | None:
    """Return what peft's `ModulesToSaveWrapper` stands for: the copy of its active adapter, or what it wraps."""
    active = wrapper._active_adapter
    name = active if isinstance(active, str) else active[0] if active else None
    copies = wrapper._modules["modules_to_save"]._modules
    chosen = copies[name] if name in copies and not wrapper._disable_adapters else wrapper._modules["original_module"]
    return chosen if isinstance(chosen, nn.Module) else None


def site_parameters(owner: nn.Module, label: str) -> SiteParameters | None:
    """Return the parameters of one label of an owner, if it has them."""
    child = parameters_of(owner)
    found = child._modules.get(label) if child is not None else None
    return found if isinstance(found, SiteParameters) else None


def add_parameters(
    owner: nn.Module, owner_path: str, label: str, parameters: SiteParameters, config: MHCConfig
) -> None:
    """Put a site's parameters on its owner.

    Raises:
        OwnerError: the owner already has something else called `mhc`.
    """
    child = parameters_of(owner)
    if child is None:
        if hasattr(owner, CHILD):
            raise OwnerError(
                f"{owner_path or 'the model'} ({type(owner).__name__}) already has an attribute {CHILD!r}, where the "
                "mHC parameters would go. Rename that attribute, or leave the block out with the option sites=."
            )
        child = OwnedParameters(config)
        owner.add_module(CHILD, child)
        child.train(owner.training)
    child.add_module(label, parameters)


def owners_in(root: nn.Module) -> Iterator[tuple[str, nn.Module, OwnedParameters]]:
    """Yield (path, owner, parameters) for every module below `root` that owns mHC parameters."""
    for path, module in root.named_modules():
        child = parameters_of(module)
        if child is not None:
            yield path, module, child


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the mHC parameters below `root` by their names in `state_dict()`; adapters that are not active, not."""
    ours = {id(parameter) for _, _, owned in owners_in(root) for parameter in owned.parameters()}
    return {name: parameter for name, parameter in root.named_parameters() if id(parameter) in ours}


def attached_config(root: nn.Module) -> MHCConfig | None:
    """Return the config that the mHC parameters below `root` were made for."""
    return next((child.config for _, _, child in owners_in(root)), None)


def joined(owner_path: str, label: str) -> str:
    """Return a site's name: the prefix of its parameters' names."""
    return ".".join(part for part in (owner_path, CHILD, label) if part)
