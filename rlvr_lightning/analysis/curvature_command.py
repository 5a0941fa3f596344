"""`curvature --config NAME.yaml`: the largest eigenvalues of the Hessian of a run's loss where it starts.

curvature --config sgd.yaml                                          the policy gradient's surrogate, on rollouts
curvature --config tiny_sft.yaml --model.from_scratch=false          the same model's likelihood of demonstrations
curvature --config sgd.yaml --data.prompts_per_step=64 --top=3       on more prompts; any setting of `fit` goes

The loss is that of the first optimizer step on the first batch, which is then fixed: its completions, rewards and
advantages stay what they were while the weights are moved. Products of the Hessian with a vector are central
differences of gradients; the step over the norm of the weights is --step. One process, float32 weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from rlvr_lightning.analysis.command import print_table, write_json
from rlvr_lightning.analysis.curvature import STEP, Hessian, top_eigenvalues
from rlvr_lightning.cli import cli_class, quieten
from rlvr_lightning.config_errors import report
from rlvr_lightning.configuration import config_names, resolve_config_arguments
from rlvr_lightning.policy_module import PolicyModule
from rlvr_lightning.schema import LossOutput

FIXED = ("--model.dtype=float32", "--model.compute_dtype=float32", "--model.gradient_release=null")
"""Where the Hessian can be had."""


class Known(Exception):
    """Ends the run when the loss of its first step has been looked at."""


def watch_first_step(module: PolicyModule, look: Callable[[Callable[[], float]], None]) -> None:
    """Have the module's first optimizer step looked at instead of made.

    Args:
        module: before its run.
        look: gets a function that goes backward through the loss of that step, and returns it.
    """

    def take_step(parts: Sequence[Any], loss_of: Callable[[Any], LossOutput]) -> dict[str, float]:
        def backward() -> float:
            total = 0.0
            for part in parts:
                loss = loss_of(part).loss
                loss.backward()
                total += float(loss.detach())
            return total

        if not parts:
            raise ValueError(
                "the first batch has nothing to learn from; give another --seed_everything, or more prompts"
            )
        look(backward)
        raise Known

    module.take_step = take_step  # type: ignore[method-assign]


def run(arguments: Sequence[str], look: Callable[[PolicyModule, Callable[[], float]], None]) -> None:
    """Begin a fit in this process, up to its first optimizer step.

    Args:
        arguments: of `fit`.
        look: gets the module, and the loss of the step (see `watch_first_step`).
    """
    arguments = resolve_config_arguments(["fit", *arguments])
    parent: Any = cli_class("fit", "-".join(config_names(arguments)) or "run")

    class First(parent):
        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            """Without anything that writes or tells."""
            accelerator = self._get(self.config_init, "trainer")["accelerator"]
            return Trainer(
                accelerator=accelerator,
                devices=1,
                max_steps=1,
                limit_val_batches=0,
                use_distributed_sampler=False,
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        def before_fit(self) -> None:
            """Instead of measuring the start."""
            if not isinstance(self.model, PolicyModule):
                raise ValueError(f"curvature is for algorithms of this package, got {type(self.model).__name__}")
            watch_first_step(self.model, lambda backward: look(self.model, backward))

    with tempfile.TemporaryDirectory() as folder:
        try:
            First(arguments)
        except Known:
            return
    raise ValueError("the run ended before its first optimizer step")


def analyse(module: PolicyModule, backward: Callable[[], float], options: argparse.Namespace) -> dict[str, Any]:
    """The record of a loss's curvature."""
    from tqdm import tqdm

    parameters = module.trained()
    hessian = Hessian(parameters, backward, options.step)
    loss, gradient = backward(), float(hessian.gradient().norm())
    with tqdm(unit=" products", desc="curvature", disable=None, leave=False) as bar:
        found = top_eigenvalues(hessian, options.top, options.seed, lambda products: bar.update(products - bar.n))
    return {
        "algorithm": type(module).__name__,
        "model": module.model_name,
        "parameters": hessian.size,
        "weight_norm": hessian.norm,
        "loss": loss,
        "grad_norm": gradient,
        "step": hessian.step,
        "products": hessian.products,
        "eigenvalues": [asdict(one) for one in found],
    }


def show(record: dict[str, Any]) -> None:
    """For people."""
    print(
        f"{record['algorithm']} on {Path(record['model']).name}: {record['parameters']:,} parameters of norm", end=" "
    )
    print(f"{record['weight_norm']:.4g}, loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}")
    rows = [[f"{one['value']:.5g}", f"{one['residual']:.2g}"] for one in record["eigenvalues"]]
    title = f"largest eigenvalues of the Hessian, {record['products']} products, steps of {record['step']:.3g}"
    print_table(title, ["eigenvalue", "within"], rows, left=())


def main(argv: list[str]) -> int:
    """Analyse; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning curvature", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="as for `fit`, with any of its settings after it")
    parser.add_argument("--top", type=int, default=5, help="how many eigenvalues (default: 5)")
    parser.add_argument("--step", type=float, default=STEP, help=f"over the norm of the weights (default: {STEP:g})")
    parser.add_argument("--seed", type=int, default=0, help="of the first vector (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there; - prints them instead of the table")
    options, settings = parser.parse_known_args(argv)
    quieten()
    try:
        if options.json and options.json != "-" and not Path(options.json).parent.is_dir():
            raise ValueError(f"--json: there is no folder {Path(options.json).parent}")
        if not options.step > 0:
            raise ValueError(f"--step must be positive, got {options.step}")
        records: list[dict[str, Any]] = []
        run(
            ["--config", options.config, *settings, *FIXED],
            lambda module, backward: records.append(analyse(module, backward, options)),
        )
    except Exception as error:
        status = report(error)
        if status is None:
            raise
        return status
    record = {"config": options.config, "settings": settings, **records[0]}
    if options.json:
        write_json(record, options.json)
    if options.json != "-":
        show(record)
    return 0
