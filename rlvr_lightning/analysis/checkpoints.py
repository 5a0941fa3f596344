"""The weights in a checkpoint of a run: of any kind that `fit` writes, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from rlvr_lightning.analysis.weights import Spec, Weights, digest, gather, split
from rlvr_lightning.checkpoint.io import is_ours, read, read_file
from rlvr_lightning.checkpoint.start import model_name
from rlvr_lightning.checkpoint.state import DELTA, Reader
from rlvr_lightning.checkpoint.stored import Source, leave_out_beside
from rlvr_lightning.delta.file import signed
from rlvr_lightning.delta.tensor import flat_bits
from rlvr_lightning.export import Kept

PREFIX = "weights/"


class CheckpointWeights:
    """A checkpoint's weights.

    Args:
        label: what the user called it.
        kept: the checkpoint.
        find: the weights of a model by its name, for those that a checkpoint holds as what changed since the start.

    Raises:
        ValueError: it is damaged, holds adapters, or starts from a model that is not at hand.
    """

    def __init__(self, label: str, kept: Kept, find: Callable[[str], Weights]) -> None:
        self.label = label
        checkpoint: dict[str, Any] = read(kept.path) if is_ours(kept.path) else read_file(kept.path)
        self.reader: Source = checkpoint["state_dict"].reader
        leave_out_beside(self.reader, self.reader.about or checkpoint.get("about") or {})
        self.entries = {model_name(name): PREFIX + name for name in self.reader.weights}
        if any(".lora_" in name for name in self.entries):
            raise ValueError(
                f"{label} holds adapters; give what this writes: python -m rlvr_lightning export {kept.path} --out DIR"
            )
        self.aliases = {model_name(name): model_name(first) for name, first in self.reader.aliases.items()}
        self.specs = {name: Spec(*self.reader.specs[entry][1:]) for name, entry in self.entries.items()}
        changed = {name: self.specs[name] for name, e in self.entries.items() if self.reader.specs[e][0] == DELTA}
        if changed:
            self.start = find(str(self.reader.about["model"]))
            if digest(self.start, changed) != self.reader.about.get("base_digest"):
                raise ValueError(
                    f"{label} holds changes of {self.reader.about['model']!r}, whose folder has other weights or names;"
                    f" give what this writes: python -m rlvr_lightning export {kept.path} --out DIR"
                )

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See `Weights`."""
        return split(self._whole(name))

    def _whole(self, name: str) -> Tensor:
        entry, spec = self.entries[name], self.specs[name]
        if not isinstance(self.reader, Reader) or self.reader.specs[entry][0] != DELTA:
            return self.reader.whole(entry)
        tensor = gather(self.start, name, spec.dtype)
        self.reader.write_(entry, signed(flat_bits(tensor)), spec.dtype)
        return tensor
