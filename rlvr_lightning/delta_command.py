"""`delta`: the difference between two models as a small file.

    delta diff BASE TUNED --out FILE    write what turns BASE into TUNED
    delta apply BASE FILE --out DIR     write TUNED again: a copy of BASE's folder with the difference applied
    delta info FILE                     what is in a file, after checking it

BASE and TUNED are folders with safetensors, hub names, `tiny` or `smollm2`. Both are read in pieces of 2**20 entries:
memory does not grow with the model. The copy has BASE's config and tokenizer, and TUNED's weights bit for bit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlvr_lightning.callbacks.change_counts import kind_of
from rlvr_lightning.delta.file import DeltaFile, Stored, load_delta
from rlvr_lightning.delta.folder import Progress, apply_to_folder, diff_folders, find_tensors


def main(argv: list[str]) -> int:
    """Run one of the commands; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error if isinstance(error, ValueError) else f'delta: {error}'}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlvr_lightning delta", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    diff = commands.add_parser("diff", help="write what turns one model into another")
    diff.add_argument("base", help="the model it starts from: a folder or a hub name")
    diff.add_argument("tuned", help="the model it leads to")
    diff.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write")
    diff.set_defaults(run=_diff)
    apply = commands.add_parser("apply", help="write the model that a file leads to")
    apply.add_argument("base", help="the model the file starts from: a folder or a hub name")
    apply.add_argument("file", type=Path, help="written by `delta diff`, or save_delta")
    apply.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to make")
    apply.set_defaults(run=_apply)
    info = commands.add_parser("info", help="what is in a file")
    info.add_argument("file", type=Path)
    info.add_argument("--top", type=int, default=10, metavar="N", help="tensors listed: those that changed most")
    info.add_argument("--json", action="store_true", help="everything, as JSON")
    info.set_defaults(run=_info)
    return parser


def _diff(options: argparse.Namespace) -> None:
    base, tuned = find_folder(options.base), find_folder(options.tuned)
    if not options.out.parent.is_dir():
        raise ValueError(f"delta: --out: there is no folder {options.out.parent}")
    _with_bar("diff", 2 * _model_bytes(base), lambda tick: diff_folders(base, tuned, options.out, tick))
    _print_summary(load_delta(options.out))


def _apply(options: argparse.Namespace) -> None:
    base, delta = find_folder(options.base), load_delta(options.file)
    _with_bar("apply", 2 * _model_bytes(base), lambda tick: apply_to_folder(base, delta, options.out, tick))
    print(f"{options.out}: weights {delta.result_digest[:12]}, as {options.file} promises")


def _info(options: argparse.Namespace) -> None:
    delta = load_delta(options.file)
    if options.json:
        print(json.dumps(describe(delta), indent=1))
        return
    _print_summary(delta)
    kinds: dict[str, list[Stored]] = {}
    for name, stored in delta.tensors.items():
        kinds.setdefault(kind_of(name), []).append(stored)
    rows = sorted(kinds.items(), key=lambda row: -sum(s.changed for s in row[1]))
    _print_table("kind", rows)
    most = sorted(delta.tensors.items(), key=lambda row: -row[1].changed)[: options.top]
    _print_table("tensor", [(name, [stored]) for name, stored in most])


def describe(delta: DeltaFile) -> dict[str, Any]:
    """What `info --json` prints."""
    return {
        "file": str(delta.path),
        "file_bytes": delta.file_bytes,
        "base_digest": delta.base_digest,
        "result_digest": delta.result_digest,
        "needs_base": delta.needs_base,
        "aliases": delta.aliases,
        **_numbers(delta.tensors.values()),
        "tensors": {
            name: {"dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape), **_numbers([s])}
            for name, s in delta.tensors.items()
        },
    }


def _numbers(stored: Iterable[Stored]) -> dict[str, float | None]:
    stored = list(stored)
    entries, changed = sum(s.numel for s in stored), sum(s.changed for s in stored)
    stored_bytes = sum(s.end - s.start for s in stored)
    return {
        "entries": entries,
        "changed": changed,
        "changed_frac": changed / entries if entries else 0.0,
        "raw_entries": sum(s.raw for s in stored),
        "stored_bytes": stored_bytes,
        "bytes_per_changed": stored_bytes / changed if changed else None,
    }


def _print_summary(delta: DeltaFile) -> None:
    numbers = _numbers(delta.tensors.values())
    each = f", {delta.file_bytes / numbers['changed']:.3f} each" if numbers["changed"] else ""
    print(f"file     {delta.path}: {delta.file_bytes:,} bytes{each}")
    print(f"changed  {numbers['changed']:,} of {numbers['entries']:,} entries, {numbers['changed_frac']:.4%}")
    if numbers["raw_entries"]:
        print(f"whole    {numbers['raw_entries']:,} entries are stored as they are: nothing else was smaller there")
    print(f"base     {delta.base_digest}{'' if delta.needs_base else ' (not needed to read the file)'}")
    print(f"result   {delta.result_digest}")


def _print_table(title: str, rows: Sequence[tuple[str, list[Stored]]]) -> None:
    lines = [(title, "tensors", "entries", "changed", "changed_frac", "bytes", "bytes/changed")]
    for name, stored in rows:
        n = _numbers(stored)
        each = "-" if n["bytes_per_changed"] is None else f"{n['bytes_per_changed']:.3f}"
        counts = (f"{len(stored):,}", f"{n['entries']:,}", f"{n['changed']:,}", f"{n['changed_frac']:.6f}")
        lines.append((name, *counts, f"{n['stored_bytes']:,}", each))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells]))


def find_folder(name: str) -> Path:
    """The folder of a model; of a hub name, that of its files in the hub's cache, fetched if they are not there."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from rlvr_lightning.policy import resolve_model

    folder = Path(resolve_model(name))
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"])
        )
    except Exception as error:  # of many kinds: no network, no such repository, no permission
        first = str(error).strip().split("\n", 1)[0]
        raise ValueError(f"delta: cannot fetch {name!r} from the hub: {first}") from None


def _model_bytes(folder: Path) -> int:
    return sum(place.nbytes for place in find_tensors(folder).values())


def _with_bar(what: str, total_bytes: int, work: Callable[[Progress], None]) -> None:
    from tqdm import tqdm

    with tqdm(total=total_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc=what, disable=None) as bar:
        work(bar.update)
