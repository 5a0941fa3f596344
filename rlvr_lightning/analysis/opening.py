"""From what a user types to weights: a model's folder or name, a run or one of its steps, a checkpoint, a delta."""

from __future__ import annotations

from pathlib import Path

from rlvr_lightning.analysis.weights import DeltaWeights, FolderWeights, Weights
from rlvr_lightning.delta.file import load_delta
from rlvr_lightning.delta.folder import find_tensors
from rlvr_lightning.delta_command import find_folder

FORMS = """\
a model's folder with safetensors, a hub name, `tiny` or `smollm2`; RUN@STEP (the newest kept step without @STEP) or a
checkpoint; a file of `delta diff`"""


def open_weights(role: str, name: str, base: Weights | None = None) -> Weights:
    """The weights behind a name.

    Args:
        role: of the argument, for error messages.
        name: see FORMS.
        base: what a delta file starts from.

    Raises:
        ValueError: there is no such thing, or it is damaged; one line that names the role.
    """
    try:
        return _open(name, base)
    except (ValueError, OSError) as error:
        reason = str(error)
        for room in ("delta: ", "export: ", "model: "):
            reason = reason.removeprefix(room)
        raise ValueError(f"{role}: {reason}") from None


def _open(name: str, base: Weights | None) -> Weights:
    path = Path(name).expanduser()
    run, _, step = name.rpartition("@")
    if run and not path.exists() and Path(run).expanduser().is_dir():
        if not step.isdecimal():
            raise ValueError(f"{name!r}: {step!r} is no step; write RUN@40 for step 40")
        return _of_run(name, Path(run).expanduser(), int(step))
    if path.is_file() and path.suffix != ".ckpt":
        if base is None:
            raise ValueError(f"{name} is a file; give a model or a run here, a delta only of what comes after it")
        return DeltaWeights(name, load_delta(path), base)
    if path.exists() and not _is_model(path) and (path.suffix == ".ckpt" or any(path.rglob("*.ckpt"))):
        return _of_run(name, path, None)
    return FolderWeights(name, find_tensors(find_folder(name)))


def _is_model(path: Path) -> bool:
    return (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()


def _of_run(label: str, path: Path, step: int | None) -> Weights:
    from rlvr_lightning.analysis.checkpoints import CheckpointWeights  # loads Lightning, which folders do without
    from rlvr_lightning.export import choose, kept_steps

    kept = choose(kept_steps(path), step)
    return CheckpointWeights(label, kept, lambda name: FolderWeights(name, find_tensors(find_folder(name))))
