"""The house rules that a reader relies on: imports point one way, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("rlvr_lightning", "callbacks", "profiling") for path in (ROOT / folder).rglob("*.py")
)
# Lower rooms know nothing of higher ones.
FLOORS = [
    {"schema", "seeds", "configuration", "estimates", "heap", "ranks", "watch"},
    {
        "advantage",
        "losses",
        "preference_losses",
        "value_head",
        "logprobs",
        "packing",
        "learning_rate",
        "rewards",
        "optim",
        "compute",
        "delta",
    },
    {
        "experience",
        "kept_batch",
        "policy",
        "data",
        "rollout",
        "scoring",
        "reference",
        "trainer_checks",
        "strategy",
        "metrics",
        "telling",
        "checkpoint",
        "evaluation",
        "evaluation_plan",
        "evaluation_table",
        "problem_file",
    },
    {"policy_module"},
    {"offline"},
    {"preference"},
    {"grpo", "sft", "dpo", "kto", "simpo", "orpo"},
    {"rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo", "cispo", "ppo", "prime"},
    {"callbacks", "profiling"},
    {
        "config_errors",
        "cli",
        "compare",
        "dry_run",
        "export",
        "replay",
        "reward_command",
        "samples",
        "delta_command",
        "report",
        "study",
        "analysis",
        "__main__",
    },
]
PURE = [
    "schema",
    "advantage",
    "losses",
    "preference_losses",
    "preference_losses",
    "logprobs",
    "packing",
    "learning_rate",
    "seeds",
    "experience",
    "ranks",
    "estimates",
    "metrics",
]
PURE += [f"delta/{name}" for name in ("sparse", "tensor", "digest", "codec", "file", "writer", "folder")]


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "rlvr_lightning" else parts[1].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules named in import statements at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    own = room(path)
    if own in ("__init__", "assets"):
        return
    assert own in floor, f"{own} stands on no floor: add it to FLOORS"
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "rlvr_lightning" and len(parts) > 1 and parts[1] in floor and own != "profiling":
            lazy_smollm2 = own == "policy" and parts[1] == "data"  # the name `smollm2` stands for a conversion
            assert floor[parts[1]] <= floor[own] or lazy_smollm2, f"{own} imports {module}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_know_no_framework(name: str) -> None:
    heavy = {module.split(".")[0] for module in imports(ROOT / "rlvr_lightning" / f"{name}.py")}
    assert not heavy & {"lightning", "transformers", "datasets", "vllm", "peft"}


def test_callbacks_need_no_other_room() -> None:
    for path in (ROOT / "callbacks").glob("*.py"):
        ours = {m for m in imports(path) if m.startswith("rlvr_lightning.")}
        assert all(m.startswith("rlvr_lightning.callbacks") for m in ours), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_importing_the_package_loads_nothing_heavy() -> None:
    probe = "import sys, rlvr_lightning.configuration; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
