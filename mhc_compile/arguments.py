"""Tell options from inputs: `attach(model, input_ids=ids, n_streams=2)` means both, and a model may take any keyword.

Hugging Face's `forward(**kwargs)` would swallow an option without a word.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import MHCConfig, option_names
from .errors import MHCOptionError

# How alike two names have to be, for the one to be taken for a slip of the pen.
_CLOSE = 0.84


@dataclass(frozen=True)
class Arguments:
    """What the arguments of `attach` or `explain` mean.

    Attributes:
        args: the example input.
        kwargs: its keyword arguments.
        config: the options, if any were given.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    config: MHCConfig | None


def read_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: MHCConfig | Mapping[str, Any] | None
) -> Arguments:
    """Tell options from inputs.

    An option is an `MHCConfig` anywhere, a dictionary given as `config` or `options`, or a keyword that names one, if
    the model's own forward has no parameter of that name.

    Raises:
        MHCOptionError: options are given twice or are no options; a keyword is neither an input nor an option, as far
            as the forward's signature tells.
    """
    signature = inspect.signature(model.forward).parameters
    inputs = {name for name, one in signature.items() if one.kind is not one.VAR_KEYWORD}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in signature.values())
    given: list[Any] = [value for value in args if isinstance(value, MHCConfig)]
    given += [config] if config is not None else []
    kwargs = dict(kwargs)
    if "options" in kwargs and "options" not in inputs:
        given.append(kwargs.pop("options"))
    named = {name: kwargs.pop(name) for name in option_names() if name in kwargs and name not in inputs}
    given += [named] if named else []
    if len(given) > 1:
        raise MHCOptionError("the options are given twice: give them once, as config=MHCConfig(…) or by their names.")
    for name in kwargs:
        if name not in inputs:
            _refuse_slip(name, inputs, takes_any, type(model).__name__)
    return Arguments(
        tuple(value for value in args if not isinstance(value, MHCConfig)), kwargs, _config(given[0]) if given else None
    )


def _config(given: Any) -> MHCConfig:
    if isinstance(given, MHCConfig):
        return given
    if isinstance(given, Mapping):
        return MHCConfig(**given)
    raise MHCOptionError(
        f"config={given!r}: must be an MHCConfig, such as mhc_compile.MHCConfig(n_streams=2), or a dictionary."
    )


def _refuse_slip(name: str, inputs: set[str], takes_any: bool, model: str) -> None:
    near = difflib.get_close_matches(name, [*inputs, *option_names(), "options", "config"], n=1, cutoff=_CLOSE)
    if near:
        what = "an input of the model" if near[0] in inputs else "an option"
        raise MHCOptionError(
            f"{name!r} is neither an input of {model} nor an option. Did you mean {near[0]!r}, {what}?"
        )
    if not takes_any:
        raise MHCOptionError(
            f"{name!r} is neither an input of {model} nor an option. Its inputs: {', '.join(sorted(inputs))}."
        )
