"""Save a model with its mHC parameters as Hugging Face saves models, and load it again without tracing it.

Beside the plain model's files lie `mhc_config.json`, with the options and where the parameters are, and
`mhc.safetensors`, with their values: transformers renames some models' weights on their way to a file, and would rename
these. A folder may be uploaded as it is. transformers' own `from_pretrained` builds the plain model of it, and reports
one unexpected weight, whose name says what to call instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..api import attach, unwrap
from ..attachment.adapters import join_adapter
from ..attachment.site_list import SiteList, attach_listed, list_sites
from ..attachment.site_parameters import CHILD, attached_config, decoded_options, named_parameters
from ..config import MHCConfig
from ..errors import MHCError, MHCOptionError, NotAttachedError
from ..memory import MEMORY

CONFIG_FILE = "mhc_config.json"
WEIGHTS_FILE = "mhc.safetensors"
_EXTRA = f".{CHILD}._extra_state"

# transformers reports it as unexpected: a message to whoever loads the folder with it.
_NOTE = "this_model_needs.mhc_compile.from_pretrained"

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def save_pretrained(model: nn.Module, folder: str | Path, **kwargs: Any) -> None:
    """Save a Hugging Face model with its mHC parameters, for `from_pretrained` of this module.

    Args:
        model: an attached model; compiled, wrapped in DDP or adapted by peft, too. Of an adapted one the adapter is
            saved, with its mHC parameters.
        folder: where to, made if it is missing. It can be uploaded as it is.
        **kwargs: those of the model's own `save_pretrained`, such as `max_shard_size`.

    Raises:
        NotAttachedError: the model has no mHC parameters.
        MHCError: the model has no `save_pretrained`.
        MHCOptionError: `push_to_hub`, which would leave the options behind.
    """
    from safetensors.torch import save_file

    root: Any = unwrap(model)
    if attached_config(root) is None:
        raise NotAttachedError("the model has no mHC parameters: model.save_pretrained(…) saves it as it is.")
    if not hasattr(root, "save_pretrained"):
        raise MHCError(
            f"{type(root).__name__} is no Hugging Face model. torch.save(model.state_dict(), path) saves everything; "
            "attach to a fresh model with the same options and load it there."
        )
    if kwargs.pop("push_to_hub", False):
        raise MHCOptionError(
            f"push_to_hub=True would upload before {CONFIG_FILE} is written. Save, then call "
            "huggingface_hub.upload_folder(repo_id=…, folder_path=…)."
        )
    ours: dict[str, Tensor] = {}
    if not hasattr(root, "peft_config"):
        state = dict(kwargs.pop("state_dict", None) or root.state_dict())
        ours = {name: state.pop(name).contiguous() for name in _names(root)}
        kwargs["state_dict"] = {**state, _NOTE: torch.zeros(1)}
    root.save_pretrained(str(folder), **kwargs)
    if kwargs.get("is_main_process", True):
        save_site_list(root, folder)
        if ours:
            save_file(ours, Path(folder, WEIGHTS_FILE))


def save_site_list(root: nn.Module, folder: str | Path) -> None:
    """Write the options and the places of a model's mHC parameters beside its weights."""
    Path(folder, CONFIG_FILE).write_text(json.dumps(list_sites(root).to_dict(), indent=1) + "\n", encoding="utf-8")


def from_pretrained(cls: Any, folder: str | Path, **kwargs: Any) -> Any:
    """Load what `save_pretrained` of this module, or the Trainer, has saved of a model with mHC parameters.

    Nothing is traced and no example input is needed, if the folder has an `mhc_config.json`; else the model is
    attached with its own `dummy_inputs`, and the options that its weights carry.

    Args:
        cls: a class with `from_pretrained`, such as AutoModelForCausalLM, or the model's own.
        folder: a folder, or the name of a repository on the hub.
        **kwargs: those of `cls.from_pretrained`: dtype, device_map, …

    Returns:
        What `cls.from_pretrained` returns, in eval mode and not compiled, with its mHC parameters in float32.

    Raises:
        NotAttachedError: the folder holds no mHC parameters; the message says how to load it.
        ConfigMismatchError: the folder's parameters do not fit the model.
    """
    where = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    tensors = dict(_mhc_tensors(folder, where))
    if not tensors:
        raise NotAttachedError(
            f"{folder} holds no mHC parameters. {getattr(cls, '__name__', cls)}.from_pretrained loads it, and "
            "mhc_compile.attach makes them."
        )
    file = _cached(folder, CONFIG_FILE, where)
    with _expected(tensors):
        made = cls.from_pretrained(str(folder), **kwargs)
    model = made[0] if isinstance(made, tuple) else made
    if file is not None:
        attach_listed(model, SiteList.from_dict(json.loads(Path(file).read_text(encoding="utf-8"))))
        if any(module in MEMORY.plain for module in model.modules()):
            torch._dynamo.reset()
    else:
        options = next(decoded_options(value) for name, value in tensors.items() if name.endswith(_EXTRA))
        collapsed = options.pop("collapsed")
        attach(model, config=MHCConfig(**options, on_graph_break="collapse" if collapsed else "carry"))
    join_adapter(model)
    _load(model, tensors, folder)
    return made


@contextmanager
def _expected(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, transformers does not report mHC parameters as unexpected; what else it reports is shown."""
    ours = {*tensors, _NOTE}

    def of_others(record: logging.LogRecord) -> bool:
        rows = [line.split(" | ")[0].strip() for line in record.getMessage().splitlines() if " | " in line]
        return not rows or any(row not in ours and f".{CHILD}." not in row and row != "Key" for row in rows)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(of_others)
    try:
        yield
    finally:
        logger.removeFilter(of_others)


def _load(model: nn.Module, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    renamed = _renamed(model)
    tensors = {renamed.get(name, name): value for name, value in tensors.items()}
    wanted = set(_names(model))
    missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, for which the model has no place"
        raise MHCError(
            f"{folder} {what} ({len(missing)} missing, {len(extra)} unexpected): it was saved from another model, or "
            "with other options. Attach by hand with the options used then, and load its state dict."
        )
    model.load_state_dict(dict(tensors), strict=False)


def _names(root: nn.Module) -> list[str]:
    """Return the names in `state_dict()` of all that belongs to the mHC parameters."""
    return [*named_parameters(root), *(name for name in root.state_dict() if name.endswith(_EXTRA))]


def _renamed(model: Any) -> dict[str, str]:
    """Map what transformers calls a weight in a file to what the model calls it; the Trainer saves under such names."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return {}
    return {saved: name for name in _names(model) for saved in revert_weight_conversion(model, {name: torch.zeros(1)})}


def _mhc_tensors(folder: str | Path, where: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    ours = _cached(folder, WEIGHTS_FILE, where)
    for file in [ours] if ours is not None else _weight_files(folder, where):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if f".{CHILD}." in f".{name}":
                    yield name, tensors.get_tensor(name)


def _weight_files(folder: str | Path, where: Mapping[str, Any]) -> list[str]:
    index = _cached(folder, "model.safetensors.index.json", where)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    files = [_cached(folder, name, where) for name in names]
    return [file for file in files if file is not None]


def _cached(folder: str | Path, name: str, where: Mapping[str, Any]) -> str | None:
    """Return a file of a folder, or of the hub; None if there is none."""
    from transformers.utils.hub import cached_file

    found: str | None = cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False, **dict(where))
    return found
