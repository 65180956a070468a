"""Find the model that a command line names, and build it with example inputs, without allocating weights."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 1
_TOKENS = 16
_AUDIO_SAMPLES = 16000
_AUDIO_FRAMES = 128

# The classes that carry a head come first: their forward is what is trained. Encoder-decoders and masked
# models go before causal ones because many of them are also registered as causal language models, as half
# of themselves.
_FAMILIES = (
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForVideoClassification",
    "AutoModelForImageTextToText",
    "AutoModel",
)


class ModelNotFoundError(Exception):
    """The command line's MODEL names nothing that can be built; the message says what would."""


@dataclass(frozen=True)
class Example:
    """A model with the arguments of one call.

    Attributes:
        model: its parameters may lie on the meta device.
        args: positional arguments.
        kwargs: keyword arguments.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_example(name: str, tokens: int | None = None) -> Example:
    """Build what MODEL names.

    Args:
        name: a Hugging Face model type ("llama"), a folder with a config.json, such a file, or
            "module:function" with a function that returns (model, inputs).
        tokens: for a Hugging Face model, as in `from_config`.

    Raises:
        ModelNotFoundError: it names nothing, or building failed.
    """
    path = Path(name)
    if path.is_dir() or path.is_file():
        return from_config(_read_config(path), tokens)
    if ":" in name:
        return _from_function(name)
    return from_config(_default_config(name), tokens)


def load_saved(name: str) -> Example:
    """Load a model with mHC parameters and an example input: a folder that was saved, or what a function returns.

    Raises:
        ModelNotFoundError: it is neither.
    """
    from .sharing.saving import from_pretrained

    path = Path(name)
    if not path.is_dir():
        if ":" in name:
            return _from_function(name)
        raise ModelNotFoundError(
            f"{name!r} is neither a folder that mhc_compile.save_pretrained has written nor a module:function that "
            "returns (attached model, inputs)."
        )
    config = _read_config(path)
    model = from_pretrained(_auto_class(config), path)
    inputs = {
        key: torch.randint(0, 99, value.shape) if value.dtype == torch.int64 else torch.randn(value.shape)
        for key, value in example_inputs(model, config, _TOKENS).items()
        if isinstance(value, Tensor)
    }
    return Example(model, (), inputs)


def _auto_class(config: Any) -> Any:
    import transformers

    named = (getattr(transformers, one, None) for one in getattr(config, "architectures", None) or ())
    families = (getattr(transformers, family) for family in _FAMILIES)
    found = [one for one in named if one is not None]
    return [*found, *(one for one in families if type(config) in one._model_mapping)][0]


def from_config(config: Any, tokens: int | None = None) -> Example:
    """Build a Hugging Face model from its configuration on the meta device, with inputs that fit.

    Args:
        config: of transformers.
        tokens: of a training step: makes text one sequence of so many tokens, or of as many as the model takes, and
            the model bfloat16. None is a short sequence, in the configured dtype.

    Raises:
        ModelNotFoundError: no auto class knows the configuration, or the model cannot be built on the meta
            device.
    """
    model = _build(config)
    model.eval()
    inputs = example_inputs(model, config, tokens or _TOKENS)
    if tokens is not None:
        model.to(torch.bfloat16)
        inputs = {
            key: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
    return Example(model, (), inputs)


def example_inputs(model: nn.Module, config: Any, tokens: int = _TOKENS) -> dict[str, Any]:
    """Return keyword arguments for one call of a Hugging Face model, as tensors on the meta device.

    Token ids are int64 [1, tokens], or as many as the model has positions; images float32 [1, channels, height, width]
    of the configured size; audio float32.
    """
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if main in accepted:
        inputs[main] = _input(main, config, tokens)
    # A two-tower model such as CLIP needs both; a language model that can look at images runs on text alone.
    required = [
        key
        for key, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    two_towers = hasattr(config, "projection_dim") and {"input_ids", "pixel_values"} <= accepted.keys()
    for key in (*required, *(("input_ids", "pixel_values") if two_towers else ())):
        if key not in inputs and key in _INPUTS:
            inputs[key] = _input(key, config, tokens)
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(config, tokens)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _default_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    name = _known_spelling(name, CONFIG_MAPPING.keys())
    if name not in CONFIG_MAPPING and name.count("/") == 1:
        raise ModelNotFoundError(
            f"{name!r} is no folder here, and nothing is downloaded. If it is a model on the hub, save its "
            "configuration where there is a network and pass the folder: "
            f"transformers.AutoConfig.from_pretrained({name!r}).save_pretrained('folder')"
        )
    if name not in CONFIG_MAPPING:
        near = difflib.get_close_matches(name.lower(), list(CONFIG_MAPPING.keys()), n=4, cutoff=0.5)
        hint = f"Did you mean {', '.join(near)}?" if near else "The names are those of transformers.CONFIG_MAPPING."
        raise ModelNotFoundError(
            f"{name!r} is no Hugging Face model type, no folder or file with a configuration, and no "
            f"module:function. {hint}"
        )
    try:
        return CONFIG_MAPPING[name]()
    except Exception as error:
        raise ModelNotFoundError(
            f"the configuration of {name!r} has no usable defaults ({_first_line(error)}). Save one with "
            "config.save_pretrained(folder) and pass the folder."
        ) from error


def _known_spelling(name: str, known: Iterable[str]) -> str:
    """Return the model type that a name means, however it is capitalized and its words are joined."""
    plain = name.lower().replace("-", "_")
    return next((kind for kind in known if kind.lower().replace("-", "_") == plain), name)


def _read_config(path: Path) -> Any:
    from transformers import CONFIG_MAPPING

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ModelNotFoundError(
            f"the folder {path} holds no config.json. config.save_pretrained({str(path)!r}) writes one."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFoundError(f"{file} is no JSON file: {_first_line(error)}.") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None:
        raise ModelNotFoundError(f'{file} has no "model_type", so it is no Hugging Face configuration.')
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=4, cutoff=0.5)
        raise ModelNotFoundError(
            f"{file}: the model_type {kind!r} is not known to the installed transformers"
            + (f" (near: {', '.join(near)})" if near else "")
            + ". A newer transformers may know it; a model of your own goes in as module:function."
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:
        raise ModelNotFoundError(f"{file} is no valid {kind} configuration: {_first_line(error)}") from error


def _from_function(name: str) -> Example:
    module_name, _, function_name = name.partition(":")
    # The command's own folder leads sys.path when it is installed; the user means theirs.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelNotFoundError(
            f"{name!r}: {_first_line(error)}. The module must be importable from the current folder, {Path.cwd()}."
        ) from error
    except Exception as error:
        raise ModelNotFoundError(
            f"{name!r}: importing {module_name} failed: {type(error).__name__}: {_first_line(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, names, n=3)
        raise ModelNotFoundError(
            f"{name!r}: {module_name} has no function {function_name!r}."
            + (f" Did you mean {', '.join(near)}?" if near else "")
        )
    try:
        made = function()
    except Exception as error:
        raise ModelNotFoundError(
            f"{name!r}: the function raised {type(error).__name__}: {_first_line(error)}"
        ) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise ModelNotFoundError(
            f"{name!r} must return (model, inputs) with an nn.Module and a dict, tuple or tensor, and "
            f"returned {type(made).__name__}."
        )
    model, inputs = made
    if isinstance(inputs, dict):
        return Example(model, (), inputs)
    if isinstance(inputs, Tensor):
        return Example(model, (inputs,), {})
    if isinstance(inputs, tuple | list):
        return Example(model, tuple(inputs), {})
    raise ModelNotFoundError(
        f"{name!r} returned inputs of type {type(inputs).__name__}; a dict (keyword arguments), a tuple or "
        "a tensor is needed."
    )


def _build(config: Any) -> nn.Module:
    kind = config.model_type
    for make in _makers(config):
        try:
            with torch.device("meta"):
                model = make()
        except Exception as error:
            raise ModelNotFoundError(
                f"a {kind!r} model cannot be built from its configuration without weights: "
                f"{type(error).__name__}: "
                f"{_first_line(error)}. Pass module:function with a function that builds it."
            ) from error
        return model
    raise ModelNotFoundError(
        f"transformers has a configuration {kind!r}, but none of its auto classes builds a model from it. "
        "Pass module:function with a function that does."
    )


def _makers(config: Any) -> Iterator[Any]:
    """Yield what can build the model, the best first: the class that the configuration names leads."""
    import transformers

    for architecture in getattr(config, "architectures", None) or ():
        named = getattr(transformers, architecture, None)
        if named is not None and hasattr(named, "_from_config"):
            yield partial(named._from_config, config)
    for family in _FAMILIES:
        auto = getattr(transformers, family)
        if type(config) in auto._model_mapping:
            yield partial(auto.from_config, config)


def _tokens(config: Any, tokens: int = _TOKENS) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(text, "max_position_embeddings", None)
    length = min(tokens, longest) if isinstance(longest, int) and longest > 0 else tokens
    return torch.zeros(_BATCH, length, dtype=torch.int64, device="meta")


def _image(config: Any) -> Tensor:
    vision = config
    for key in ("vision_config", "backbone_config"):
        if getattr(config, key, None) is not None and getattr(config, "image_size", None) is None:
            vision = getattr(config, key)
    size = _first(vision, ("image_size", "img_size", "input_size"), 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(
        _BATCH, _first(vision, ("num_channels", "in_channels", "in_chans"), 3), height, width, device="meta"
    )


def _video(config: Any) -> Tensor:
    frames = _first(config, ("num_frames",), 8)
    return _image(config).unsqueeze(1).repeat(1, frames, 1, 1, 1)


def _waveform(config: Any) -> Tensor:
    return torch.zeros(_BATCH, _AUDIO_SAMPLES, device="meta")


def _spectrogram(config: Any) -> Tensor:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim")
    mels = _first(config, names, 80)
    positions = getattr(config, "max_source_positions", None)
    if config.model_type == "whisper" and isinstance(positions, int):
        # Whisper accepts this length only, with the frames last.
        return torch.zeros(_BATCH, mels, 2 * positions, device="meta")
    return torch.zeros(_BATCH, _AUDIO_FRAMES, mels, device="meta")


_INPUTS = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _image,
    "pixel_values_videos": _video,
    "input_values": _waveform,
    "input_features": _spectrogram,
    "inputs": _tokens,
}


def _input(name: str, config: Any, tokens: int) -> Tensor:
    if name not in _INPUTS:
        raise ModelNotFoundError(
            f"a {config.model_type!r} model takes {name!r}, for which there is no example. Pass "
            "module:function with a function that returns (model, inputs)."
        )
    if name == "pixel_values" and getattr(config, "num_frames", None) is not None:
        return _video(config)
    make = _INPUTS[name]
    return _tokens(config, tokens) if make is _tokens else make(config)


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((value for key in names if (value := getattr(config, key, None)) is not None), default)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
