"""What a module has to do with its checkpoints: know what it started from, and take up what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.tensor import DTensor

from rlvr_lightning.checkpoint.contents import SinceStart
from rlvr_lightning.checkpoint.io import DeltaCheckpointIO
from rlvr_lightning.checkpoint.restore import restore_
from rlvr_lightning.checkpoint.resume import (
    Settings,
    between_steps,
    catch_up,
    check_settings,
    random_state,
    restore_random_state,
    row_of,
    settings_of,
)
from rlvr_lightning.checkpoint.sharded import ShardedCheckpoints
from rlvr_lightning.checkpoint.start import Start, about_model
from rlvr_lightning.checkpoint.stored import StoredWeights
from rlvr_lightning.ranks import ALONE, Ranks
from rlvr_lightning.reference import Reference

Record = dict[str, Any]


class DeltaCheckpoints(LightningModule):
    """What a module needs so that its checkpoints can be deltas: call `remember_start` when the weights are there."""

    start: Start | None = None
    counts: tuple[str, ...] = ()
    """Names of attributes, integers, that checkpoints hold as well."""
    beside: tuple[str, ...] = ()
    """How the names of tensors begin that are not of the model: checkpoints hold them whole, an export leaves them."""
    _settings: Settings | None = None
    _resumed: Record | None = None

    def remember_start(self, reference: Reference | None = None) -> None:
        """The weights are now what the run starts from; nothing is done unless `DeltaCheckpointIO` will need it."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if isinstance(trainer.strategy.checkpoint_io, DeltaCheckpointIO):
            folder = Path(trainer.log_dir or trainer.default_root_dir)  # every rank must ask
            sharded = any(isinstance(p, DTensor) for p in self.parameters())
            keeps = folder if sharded or trainer.is_global_zero else None
            self.start = Start(self, reference, keeps, self._shards)

    @property
    def _shards(self) -> Ranks:
        layout = getattr(self, "layout", None)
        return layout.shards if layout is not None else ALONE

    @property
    def _ranks(self) -> Ranks:
        layout = getattr(self, "layout", None)
        return layout.data if layout is not None else ALONE

    def on_fit_start(self) -> None:
        """Note the settings, which checkpoints hold."""
        super().on_fit_start()
        self._settings = settings_of(self)

    def on_train_start(self) -> None:
        """When resuming, go on where the checkpoint was saved, with its random numbers."""
        super().on_train_start()
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return
        if states := resumed["random"]:
            restore_random_state(states[self._ranks.rank % len(states)])
        if resumed["row"] is not None:
            catch_up(self.trainer, resumed["row"], resumed["loops"]["fit_loop"]["epoch_progress"])

    def on_save_checkpoint(self, checkpoint: Record) -> None:
        """Say what the weights started from, keep the counts, the settings and every rank's random state."""
        checkpoint |= {name: getattr(self, name) for name in self.counts}
        checkpoint |= {"settings": self._settings, "random": self._ranks.gather(random_state())}
        checkpoint["row"] = row_of(self.trainer) if between_steps(checkpoint) else None
        checkpoint["about"] = about_model(self)
        if isinstance(self.trainer.strategy.checkpoint_io, DeltaCheckpointIO):
            weights = checkpoint["state_dict"] = SinceStart(checkpoint["state_dict"])
            weights.about, weights.start = dict(checkpoint["about"]), self.start
            if self.start is not None:
                weights.about["base_digest"] = self.start.digest

    def on_load_checkpoint(self, checkpoint: Record) -> None:
        """Put weights in place one tensor at a time, and let the reference follow, before they are overwritten.

        Raises:
            ValueError: the run's settings are not those of the checkpoint.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            if checkpoint.get("settings"):
                check_settings(checkpoint["settings"], settings_of(self), self.trainer.ckpt_path)
            self._resumed = {name: checkpoint.get(name) for name in ("random", "row", "loops")}
        reference: Reference | None = getattr(self, "reference", None)
        for name in self.counts:
            setattr(self, name, checkpoint.get(name, 0))
        weights = checkpoint["state_dict"]
        if isinstance(self.trainer.strategy, ShardedCheckpoints):  # it does that
            return
        if isinstance(weights, StoredWeights):
            restore_(self, weights.reader, self.start, reference)
            checkpoint["state_dict"] = self.state_dict()
        elif reference is not None:
            reference.rebase({p: weights[name] for name, p in self.named_parameters() if name in weights})
