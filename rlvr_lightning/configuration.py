"""Finding configs by name: the working directory first, then the packaged ones. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parent / "configs"


def find_config(name: str) -> Path:
    """The file of a config's name.

    Raises:
        ValueError: it is nowhere; the message lists the packaged ones.
    """
    for path in (Path(name), PACKAGED / name):
        if path.is_file():
            return path
    raise ValueError(f"--config: no file {name!r} here, nor among the packaged: {', '.join(packaged_configs())}")


def packaged_configs() -> list[str]:
    """Names of the configs shipped with the package."""
    return sorted(path.name for path in PACKAGED.glob("*.yaml"))


def resolve_config_arguments(argv: list[str]) -> list[str]:
    """Replace the names after --config (or -c) by the files they stand for.

    Example:
        >>> found = resolve_config_arguments(["fit", "--config=sgd.yaml", "--trainer.max_steps", "3"])
        >>> found[1].endswith("configs/sgd.yaml"), found[2:]
        (True, ['--trainer.max_steps', '3'])
    """
    out = []
    flags = ("--config", "-c")
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag in flags and equals:
            out.append(f"{flag}={find_config(value)}")
        elif i and argv[i - 1] in flags:
            out.append(str(find_config(word)))
        else:
            out.append(word)
    return out


def config_names(argv: list[str]) -> list[str]:
    """Stems of the configs named on a command line, for naming the run folder."""
    values = [word.partition("=")[2] for word in argv if word.startswith(("--config=", "-c="))]
    values += [argv[i + 1] for i, word in enumerate(argv[:-1]) if word in ("--config", "-c")]
    return [Path(value).stem for value in values]


def main(argv: list[str]) -> None:
    """List the packaged configs with the first line of each."""
    names = packaged_configs()
    width = max(map(len, names))
    for name in names:
        first = (PACKAGED / name).read_text().splitlines()[0].lstrip("# ")
        print(f"{name:<{width}}  {first}")
