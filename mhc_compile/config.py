"""`MHCConfig`: every option of the backend, checked at construction."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import ConfigMismatchError, MHCOptionError
from .kernels import fusions
from .kernels.manifolds import MANIFOLDS, MAX_STREAMS

INITS = ("preserve", "paper")
READOUTS = ("mean", "learned")
FUSIONS = ("auto", *fusions.FUSIONS)
GRAPH_BREAKS = ("carry", "collapse", "error")
RECOMPUTES = ("auto", "none")
# Rewriting passes that a model runs without, too.
OPTIONAL_PASSES = ("lower_native", "fuse_boundaries", "fold_norms", "annotate_recompute", "mark_cacheable")

# The options that decide which parameters exist and what they mean. The rest may change from one
# compilation to the next without touching a checkpoint.
STRUCTURAL = ("n_streams", "manifold", "init", "readout", "sites", "min_sites")

# What decides the function that the model computes, and so comes with its parameters.
_INHERITED = (*STRUCTURAL, "sinkhorn_iters", "on_graph_break")

# What a checkpoint means: the same parameters are another model where one of these differs.
_SAVED = ("n_streams", "manifold", "sinkhorn_iters", "readout")

SiteFilter = str | Callable[[str], bool] | None


@dataclass(frozen=True)
class MHCConfig:
    """The options of `backend="mhc"`; the same names are the keys of `options=`.

    Args:
        n_streams: number of parallel residual streams, 1 to 8.
        manifold: where the mixing matrices live: "sinkhorn" (doubly stochastic, arXiv 2512.24880 Eq. 8-9),
            "none" (unconstrained, arXiv 2409.19606), "identity" (streams do not mix),
            "permutation" (exactly doubly stochastic by weighted permutations, 2 to 4 streams, arXiv 2601.05732),
            "kronecker" (exactly doubly stochastic by a Kronecker product, 2, 4 or 8 streams, arXiv 2601.21579),
            "row" (rows sum to 1, columns are free), or a name that was added to `mhc_compile.kernels.manifolds`.
        sinkhorn_iters: Sinkhorn-Knopp iterations, at least 1 (the paper uses 20).
        init: "preserve" starts from exactly the original model; "paper" starts from scale 0.01 and random phi.
        readout: how a chain's streams become one value at its end: "mean", or "learned" (sigmoid-weighted).
        fusion: "site" calls two opaque operators per site, `pre` and `post`; "boundary" joins a site's `post` and the
            next site's `pre`, on a GPU with the norm that alone reads its layer input; "auto" takes the one of these
            that suits device, tokens and width; "paper" runs `pre` in the paper's separate kernels; "inductor" inlines
            the plain ATen mathematics and leaves the fusion to Inductor.
        recompute: which streams are stored for the backward. An integer stores them every so many sites, and computes
            the ones in between, the layer inputs and the coefficients again, without rerunning a branch; "auto" takes
            the interval that needs the least memory; "none" stores what autograd asks for. No inner backend but those
            that partition a joint graph ("inductor", "aot_eager") heeds it.
        sites: a glob or a predicate over site names that picks the residual adds to rewrite; None is all.
        min_sites: a chain with fewer sites stays as it is; where a cut makes pieces of it, each piece counts alone.
        inner: the Dynamo backend that compiles the rewritten graph.
        on_graph_break: what becomes of a stream that reaches over several graphs: "carry" hands the streams on from
            graph to graph, which is the model of one graph, and needs `attach`; "error" raises; "collapse" averages the
            streams at each cut and expands them again behind it, which is another model.
        check_carried: compare the visible value with the streams' readout wherever streams are carried into a graph:
            finds Python code that changes the value where autograd cannot see it. Reads the streams once more.
        disable_passes: names of optional rewriting passes to leave out, to find the one that a fault comes from.
        strict: raise when nothing was found to rewrite. Without, what lies behind a cut stays plain, with a warning.

    Raises:
        MHCOptionError: a value is out of its range; the message names the range.
    """

    n_streams: int = 4
    manifold: str = "sinkhorn"
    sinkhorn_iters: int = 20
    init: str = "preserve"
    readout: str = "mean"
    fusion: str = "auto"
    recompute: str | int = "auto"
    sites: SiteFilter = None
    min_sites: int = 2
    inner: str = "inductor"
    on_graph_break: str = "carry"
    check_carried: bool = False
    strict: bool = True
    disable_passes: tuple[str, ...] = ()

    def __new__(cls, *args: Any, **options: Any) -> MHCConfig:
        """Refuse names that are no options before the constructor turns them into a TypeError."""
        _check_names(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every value; a bad one never gets further than this."""
        _check_int("n_streams", self.n_streams, 1, MAX_STREAMS)
        _check_int("sinkhorn_iters", self.sinkhorn_iters, 1, None)
        _check_int("min_sites", self.min_sites, 1, None)
        _check_choice("manifold", self.manifold, tuple(MANIFOLDS))
        sizes = MANIFOLDS[self.manifold].sizes
        if self.n_streams not in sizes:
            raise MHCOptionError(
                f"n_streams={self.n_streams}: the manifold {self.manifold!r} is defined for {_either(sizes)} streams."
            )
        _check_choice("init", self.init, INITS)
        _check_choice("readout", self.readout, READOUTS)
        _check_choice("on_graph_break", self.on_graph_break, GRAPH_BREAKS)
        _check_choice("fusion", self.fusion, FUSIONS)
        if isinstance(self.recompute, str):
            _check_choice("recompute", self.recompute, RECOMPUTES, "the number of sites between stored streams")
        else:
            _check_int("recompute", self.recompute, 1, None)
        for name, value in (("strict", self.strict), ("check_carried", self.check_carried)):
            if not isinstance(value, bool):
                raise MHCOptionError(f"{name}={value!r}: must be True or False.")
        # A list, as it comes from `options=`, would not hash.
        passes = self.disable_passes
        object.__setattr__(self, "disable_passes", (passes,) if isinstance(passes, str) else tuple(passes))
        for name in self.disable_passes:
            _check_choice("disable_passes", name, OPTIONAL_PASSES)
        if not isinstance(self.inner, str):
            raise MHCOptionError(
                f"inner={self.inner!r}: must be the name of a Dynamo backend, such as 'inductor' or 'aot_eager'."
            )
        if self.sites is not None and not isinstance(self.sites, str) and not callable(self.sites):
            raise MHCOptionError(
                f"sites={self.sites!r}: must be a glob such as '*.mlp', or a callable that takes a site's name."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, attached: MHCConfig | None = None) -> MHCConfig:
        """Build a config from `options=`.

        Options that decide the function and are left out come from the config that is attached, if any; the others,
        such as `inner`, from the defaults.

        Raises:
            MHCOptionError: an unknown name (the message lists near matches) or a bad value.
            ConfigMismatchError: a given option would need other parameters than the attached ones.
        """
        options = dict(options or {})
        _check_names(options)
        if attached is None:
            return cls(**options)
        cls(**options)
        for name in STRUCTURAL:
            if name in options and options[name] != getattr(attached, name):
                raise ConfigMismatchError(
                    f"this model's mHC parameters were made with {name}={getattr(attached, name)!r}, but "
                    f"{name}={options[name]!r} is asked for now. Leave the option out to use what is attached, "
                    "or call mhc_compile.detach(model) first and attach again (trained mHC parameters are "
                    "dropped: save them before)."
                )
        inherited = {name: getattr(attached, name) for name in _INHERITED}
        return cls(**{**inherited, **options})

    @property
    def function_key(self) -> str:
        """The options that decide what is computed, as a text: where it differs, graphs do."""
        return ", ".join(f"{name}={self.to_dict()[name]!r}" for name in _INHERITED)

    @property
    def saved(self) -> dict[str, Any]:
        """The options that a checkpoint carries: where one differs, its parameters mean another model."""
        return {name: getattr(self, name) for name in _SAVED} | {"collapsed": self.on_graph_break == "collapse"}

    def wants(self, site_name: str) -> bool:
        """Return whether the `sites` option picks the site of this name."""
        if self.sites is None:
            return True
        if isinstance(self.sites, str):
            return fnmatch.fnmatchcase(site_name, self.sites)
        return bool(self.sites(site_name))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as a dictionary; a callable `sites` is shown by its name."""
        return {
            key: getattr(value, "__name__", repr(value)) if callable(value) else value
            for key, value in asdict(self).items()
        }


def option_names() -> tuple[str, ...]:
    """Return the names of all options."""
    return tuple(field.name for field in fields(MHCConfig))


def _check_names(options: Mapping[str, Any]) -> None:
    known = option_names()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"Did you mean {_listed(near)}?" if near else f"Known options: {_listed(known)}."
            raise MHCOptionError(f"unknown option {name!r}. {hint}")


def _either(sizes: tuple[int, ...]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    bound = f"between {low} and {high}" if high is not None else f"at least {low}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise MHCOptionError(f"{name}={value!r}: must be an integer, {bound}.")
    if value < low or (high is not None and value > high):
        raise MHCOptionError(f"{name}={value}: must be {bound}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...], otherwise: str = "") -> None:
    if value not in choices:
        otherwise = f", or {otherwise}" if otherwise else ""
        near = difflib.get_close_matches(str(value), choices, n=2)
        hint = f" Did you mean {_listed(near)}?" if near else ""
        raise MHCOptionError(f"{name}={value!r}: must be one of {_listed(choices)}{otherwise}.{hint}")
