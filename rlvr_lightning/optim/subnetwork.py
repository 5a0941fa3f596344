"""Training some entries of the weights and freezing all others, bit for bit: a mask, one bit an entry.

The gradient of what is frozen is set to 0 as soon as it is complete (mask * gradient, arXiv 2505.11711): neither its
norm nor the optimizer ever sees it. An optimizer that leaves an entry alone whose gradients are all 0 then freezes it
exactly, whatever its state and precision; `check_freezes` tries whether one does (decay of weights does not).

A mask's file is safetensors: of each tensor its bits, uint8, entry k in bit k % 8 of byte k // 8. The metadata hold
`format`, `version`, `shapes` (JSON), `made` (a sentence), and `checksum`: SHA-256 over the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rlvr_lightning.delta.digest import combine, tensor_digest
from rlvr_lightning.delta.file import DeltaFile, load_delta
from rlvr_lightning.delta.tensor import box, local, whole
from rlvr_lightning.ranks import Ranks

FORMAT, VERSION = "rlvr_lightning subnetwork", "1"
CHUNK_BYTES = 1 << 17
"""Of bits unpacked at a time: a byte becomes eight."""


def pack(mask: Tensor) -> Tensor:
    """Bits of a mask.

    Args:
        mask: bool, any shape.

    Returns:
        uint8 [ceil(entries / 8)] on its device.

    >>> pack(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist()
    [9, 1]
    """
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return torch.cat([(part.view(-1, 8) * powers).sum(1, dtype=torch.uint8) for part in flat.split(8 * CHUNK_BYTES)])


def unpack(packed: Tensor, entries: int) -> Tensor:
    """The other way: bool [entries]."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> places).bitwise_and_(1).bool().view(-1)[:entries]


def freeze_(tensor: Tensor, packed: Tensor) -> None:
    """Set to 0 what is outside of the mask; also what is not finite there.

    Args:
        tensor: contiguous.
        packed: its mask's bits, on its device.
    """
    for part, bits in zip(tensor.view(-1).split(8 * CHUNK_BYTES), packed.split(CHUNK_BYTES), strict=True):
        part.masked_fill_(unpack(bits, len(part)).logical_not_(), 0)


@dataclass(frozen=True)
class Subnetwork:
    """Masks of the tensors of a model, by their names in its folder."""

    bits: dict[str, Tensor]
    """uint8, see `pack`."""
    shapes: dict[str, tuple[int, ...]]
    made: str = ""
    """Where it comes from."""

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each tensor: entries that are trained, entries."""
        return {
            name: (int(unpack(b, prod(self.shapes[name])).sum()), prod(self.shapes[name])) for name, b in self.items()
        }

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and bits."""
        yield from self.bits.items()

    def mask(self, name: str) -> Tensor:
        """Of a tensor: bool, in its shape."""
        return unpack(self.bits[name], prod(self.shapes[name])).view(self.shapes[name])

    def save(self, path: Path) -> None:
        """Write it to a file."""
        about = {"format": FORMAT, "version": VERSION, "shapes": json.dumps(self.shapes), "made": self.made}
        bits = {name: tensor.contiguous() for name, tensor in self.items()}
        save_file(bits, path, about | {"checksum": _checksum(about, bits)})


def load_subnetwork(path: Path) -> Subnetwork | None:
    """Read a mask's file; None if it is safetensors of another kind.

    Raises:
        ValueError: there is none, it is damaged, or of another version.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            if about.get("format") != FORMAT:
                return None
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or damaged: {error}") from None
    if about.get("version") != VERSION:
        raise ValueError(f"{path} has version {about.get('version')!r}, this program reads {VERSION!r}")
    checksum = about.pop("checksum", "")
    if checksum != _checksum(about, bits):
        raise ValueError(f"{path} is damaged: its checksum differs")
    shapes = {name: tuple(shape) for name, shape in json.loads(about["shapes"]).items()}
    return Subnetwork({name: bits[name] for name in shapes}, shapes, about.get("made", ""))


def _checksum(about: Mapping[str, str], bits: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(bits):
        state.update(f"{name} {len(bits[name])}\n".encode())
        state.update(bits[name].cpu().numpy().tobytes())
    return state.hexdigest()


def open_subnetwork(path: Path, parameters: Mapping[str, Tensor]) -> Subnetwork:
    """The mask in a file, or of the entries that a delta changes.

    Args:
        path: of a mask, or of a delta from the model as it is now.
        parameters: of the model, by their names in its folder; sharded ones are gathered one at a time, by all ranks.

    Raises:
        ValueError: it is neither, is damaged, or a delta from another model.
    """
    found = load_subnetwork(path)
    return found if found is not None else _of_delta(load_delta(path), parameters)


def _of_delta(file: DeltaFile, parameters: Mapping[str, Tensor]) -> Subnetwork:
    shapes = {name: stored.shape for name, stored in file.tensors.items()}
    _check_shapes(parameters, shapes)

    def start(name: str) -> Tensor:
        return whole(parameters[name].detach()).to("cpu", file.tensors[name].dtype)

    if combine((name, tensor_digest(name, start(name))) for name in shapes) != file.base_digest:
        raise ValueError(f"{file.path} is a delta from other weights than the model's")
    bits = {}
    for name, stored in file.tensors.items():
        mask = torch.zeros(stored.numel, dtype=torch.bool)
        mask[file.tensor(name, start(name) if file.needs_base else None).indices.long()] = True
        bits[name] = pack(mask)
    return Subnetwork(bits, shapes, f"changed by {file.path}")


class Frozen:
    """Keeps everything outside of a subnetwork as it is, from now on.

    Args:
        parameters: of the model, by their names in its folder; sharded or not. Hooks that use up gradients are to be
            registered after this.
        subnetwork: of exactly these.

    Raises:
        ValueError: it is another model's, or has no entry to train.
    """

    def __init__(self, parameters: Mapping[str, Tensor], subnetwork: Subnetwork) -> None:
        _check_shapes(parameters, subnetwork.shapes)
        if not any(bool(bits.any()) for bits in subnetwork.bits.values()):
            raise ValueError("the mask is empty: nothing would be trained")
        self.bits = {p: _local_bits(p, name, subnetwork) for name, p in parameters.items()}
        self._handles: list[RemovableHandle] = [p.register_post_accumulate_grad_hook(self._freeze) for p in self.bits]

    def held_bytes(self, shards: Ranks) -> float:
        """This rank's part of the bytes that all shards of the masks take, once what several ranks hold alike."""
        return sum(bits.nbytes / shards.copies_of(parameter) for parameter, bits in self.bits.items())

    def close(self) -> None:
        """Let everything go again."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _freeze(self, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient = local(parameter.grad)
        if self.bits[parameter].device != gradient.device:
            self.bits[parameter] = self.bits[parameter].to(gradient.device)  # where the trainer has moved the model
        freeze_(gradient, self.bits[parameter])


def _local_bits(parameter: Tensor, name: str, subnetwork: Subnetwork) -> Tensor:
    """Of this rank's shard."""
    if not hasattr(parameter, "placements"):
        return subnetwork.bits[name].to(parameter.device)
    return pack(box(subnetwork.mask(name), parameter)).to(local(parameter).device)


def _check_shapes(parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless a mask or a delta is of these parameters."""
    for names, others, whose in (
        (parameters, shapes, "it has no tensor"),
        (shapes, parameters, "the model does not train a tensor"),
    ):
        if missing := [name for name in names if name not in others]:
            raise ValueError(f"{whose} {missing[0]!r} ({len(missing)} such in all); it is of another model")
    for name, shape in shapes.items():
        if tuple(parameters[name].shape) != shape:
            found = list(parameters[name].shape)
            raise ValueError(f"{name!r} is {list(shape)} there, {found} in the model; it is of another model")


def check_freezes(make: Callable[..., Optimizer], dtype: torch.dtype) -> None:
    """Raise ValueError for an optimizer that moves entries whose gradients are all 0; it is tried on four numbers.

    Args:
        make: makes the optimizer of a list of parameters.
        dtype: of the weights.
    """
    weight = torch.nn.Parameter(torch.tensor([[1.0, -1.001], [0.3, 0.7]], dtype=dtype))
    last = weight.detach()[1, 1].clone()
    optimizer = make([weight])
    name = type(optimizer).__name__
    if decay := max(float(group.get("weight_decay") or 0.0) for group in optimizer.param_groups):
        raise ValueError(f"model.subnetwork: {name} with weight_decay {decay} would move what is frozen; set it to 0.0")
    for _ in range(3):
        weight.grad = torch.tensor([[0.1, 0.2], [0.3, 0.0]], dtype=dtype)
        optimizer.step()
    if not torch.equal(weight.detach()[1, 1], last):
        raise ValueError(
            f"model.subnetwork: {name} moves entries whose gradients are 0, so nothing would be frozen; take "
            "torch.optim.SGD, AdamW, or rlvr_lightning.optim.SGD"
        )
