"""`MHCCallback`: what Hugging Face's Trainer needs to train mHC parameters well, and to show that they learn."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(f"mhc_compile.MHCCallback needs transformers, which cannot be imported: {error}") from error

from ..api import unwrap
from ..attachment.site_parameters import attached_config, named_parameters
from ..errors import MHCWarning, NotAttachedError
from ..gain import composite_gain
from ..sharing.saving import save_site_list
from .inspection import STILL, inspect
from .static_mixing import static_mixing


class MHCCallback(TrainerCallback):
    """For `Trainer(model=model, …, callbacks=[mhc_compile.MHCCallback()])`, on a model that is attached.

    - The Trainer's default groups let `scale` decay; with this neither scale nor bias does, phi does.
    - With `mixing_rate=10` the mHC parameters learn at ten times the Trainer's rate, schedule included: what a
      checkpoint that is trained on wants (`param_groups` says why).
    - Every log line has four scalars of the mixing at phi = 0: `mhc_moved`, the largest distance of a coefficient from
      its start; `mhc_projection`, how much the input decides (root mean square of phi times scale); `mhc_gain_forward`
      and `mhc_gain_backward` of the product over all sites (arXiv 2512.24880, section 3.1).
    - A warning where after `warn_after` steps nothing has moved.
    - At the end `mhc.html` and, with matplotlib, `mhc.png` in the output folder show the mixing over depth, for the
      first batch of the training data.
    - Checkpoints get the file that `mhc_compile.from_pretrained` needs to load them without tracing the model.
    """

    def __init__(self, warn_after: int = 100, mixing_rate: float = 1.0) -> None:
        """Set when to warn, and how fast the mixing learns.

        Args:
            warn_after: optimizer steps after which a mixing that has not moved is worth a warning.
            mixing_rate: the mHC parameters' learning rate, as a multiple of the Trainer's.
        """
        self.warn_after = warn_after
        self.mixing_rate = mixing_rate
        self._warned = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Get hold of the Trainer, which is being made, before it makes its optimizer."""
        trainer = self._trainer()
        if trainer is None:
            return
        root = unwrap(trainer.model)
        if attached_config(root) is None:
            raise NotAttachedError(
                "the Trainer's model has no mHC parameters: call mhc_compile.attach(model, example_input) before "
                "Trainer(model=model, …)."
            )
        decayed, log, create_optimizer = trainer.get_decay_parameter_names, trainer.log, trainer.create_optimizer

        def without_gates(model: nn.Module) -> list[str]:
            kept = {name for name in named_parameters(model) if not name.endswith(".phi")}
            return [name for name in decayed(model) if name not in kept]

        def with_scalars(logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            log({**logs, **(self.scalars(root) if "loss" in logs else {})}, *arguments, **options)

        def with_mixing_rate(*arguments: Any, **options: Any) -> Any:
            fresh = trainer.optimizer is None
            optimizer = create_optimizer(*arguments, **options)
            if fresh and self.mixing_rate != 1.0:
                # Before the scheduler is made, which takes the groups' rates for those to begin with.
                _learn_at(self.mixing_rate, trainer.optimizer, set(map(id, named_parameters(root).values())))
            return optimizer

        trainer.create_optimizer = with_mixing_rate
        trainer.get_decay_parameter_names = without_gates
        trainer.log = with_scalars

    def scalars(self, model: nn.Module) -> dict[str, float]:
        """Return what every log line gets."""
        sites = static_mixing(unwrap(model))
        forward, backward = composite_gain([site.res for site in sites])
        return {
            "mhc_moved": max(site.moved for site in sites),
            "mhc_projection": max(site.projection for site in sites),
            "mhc_gain_forward": forward[-1],
            "mhc_gain_backward": backward[-1],
        }

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Warn, once, if the mixing stands still."""
        if self._warned or model is None or state.global_step < self.warn_after:
            return
        self._warned = True
        scalars = self.scalars(model)
        if max(scalars["mhc_moved"], scalars["mhc_projection"]) < STILL:
            warnings.warn(
                f"after {state.global_step} steps no mixing coefficient has moved by more than {STILL:g}: the model "
                "still computes what the plain one would. Give the mHC parameters a larger learning rate: "
                "MHCCallback(mixing_rate=10).",
                MHCWarning,
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Complete a checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if model is not None and state.is_world_process_zero and folder.is_dir():
            save_site_list(unwrap(model), folder)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Write the page and the picture."""
        if model is None or train_dataloader is None or not state.is_world_process_zero:
            return
        root = unwrap(model)
        device = next(root.parameters()).device
        batch = next(iter(train_dataloader))
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
        found = inspect(root, **inputs)
        found.to_html(Path(args.output_dir, "mhc.html"))
        if importlib.util.find_spec("matplotlib") is not None:
            found.to_png(Path(args.output_dir, "mhc.png"))

    def _trainer(self) -> Any:
        """Return the Trainer whose constructor is running: it hands callbacks everything but itself."""
        for frame, _ in traceback.walk_stack(sys._getframe(1)):
            candidate = frame.f_locals.get("self")
            handler = getattr(candidate, "callback_handler", None)
            if handler is not None and any(callback is self for callback in handler.callbacks):
                return candidate
        return None


def _learn_at(multiple: float, optimizer: torch.optim.Optimizer, ours: set[int]) -> None:
    """Move the parameters with these ids to groups that learn at a multiple of the rate of those they were in."""
    for group in [*optimizer.param_groups]:
        mine = [parameter for parameter in group["params"] if id(parameter) in ours]
        if not mine:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
        optimizer.add_param_group({**group, "params": mine, "lr": multiple * group["lr"]})
