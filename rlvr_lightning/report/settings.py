"""The settings in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rlvr_lightning.profiling.table import Table
from rlvr_lightning.report.reading import Run, notes


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Every setting under its full name; values as YAML writes them, lists whole.

    >>> flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}})
    {'a.b': '1', 'a.c': '[1, 2]', 'd': 'null', 'e': '{}'}
    """
    if not isinstance(config, Mapping) or (not config and prefix):
        text = yaml.safe_dump(config, default_flow_style=True, width=10**9, allow_unicode=True)
        return {prefix: text.removesuffix("\n").removesuffix("\n...")}
    return {
        name: text
        for key, value in config.items()
        for name, text in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def differences(runs: Sequence[Run]) -> Table:
    """One row for each setting that is not the same in all runs that have a config; `-` where there is none."""
    known = [run for run in runs if run.config]
    settings = [flat(run.config) for run in known]
    names = list(dict.fromkeys(name for found in settings for name in found))
    rows = [
        [name.replace(".init_args.", "."), *(found.get(name) for found in settings)]
        for name in names
        if len({found.get(name) for found in settings}) > 1
    ]
    said = notes((run.name, "no config") for run in runs if not run.config)
    if len(known) > 1 and not rows:
        said.append("The configs are the same.")
    return Table("Settings that differ", ["setting", *(run.name for run in known)], rows, said)
