"""`curvature --config NAME.yaml`: the largest eigenvalues of the Hessian of a run's loss where it starts.

curvature --config sgd.yaml                                          the policy gradient's surrogate, on rollouts
curvature --config sft.yaml                                          the same model's likelihood of demonstrations
curvature --config sgd.yaml --data.prompts_per_step=64 --top=3       on more prompts; any setting of `fit` goes

The loss is that of the first optimizer step on the first batch, which is then fixed: its completions, rewards and
advantages stay what they were while the weights are moved. Products of the Hessian with a vector are central
differences of gradients; the step over the norm of the weights is --step. One process, float32 weights. With --json
RUN/curvature.json, RUN a run's folder, `report` shows them.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvr_lightning.analysis.command import hand_over, print_table
from rlvr_lightning.analysis.curvature import STEP, Hessian, top_eigenvalues
from rlvr_lightning.analysis.first_step import FirstStep, first_step
from rlvr_lightning.cli import quieten
from rlvr_lightning.config_errors import report


def analyse(step: FirstStep, options: argparse.Namespace) -> dict[str, Any]:
    """The record of a loss's curvature."""
    from tqdm import tqdm

    hessian = Hessian(step.module.trained(), step.backward, options.step)
    loss, gradient = step.backward(), float(hessian.gradient().norm())
    with tqdm(unit=" products", desc="curvature", disable=None, leave=False) as bar:
        found = top_eigenvalues(hessian, options.top, options.seed, lambda products: bar.update(products - bar.n))
    return {
        "algorithm": type(step.module).__name__,
        "model": Path(step.module.model_name).name,
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
    print(f"{record['algorithm']} on {record['model']}: {record['parameters']:,} parameters of norm", end=" ")
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
        first_step(["--config", options.config, *settings], lambda step: records.append(analyse(step, options)))
    except Exception as error:
        status = report(error)
        if status is None:
            raise
        return status
    record = {"config": options.config, "settings": settings, **records[0]}
    hand_over(record, options, lambda: show(record))
    return 0
