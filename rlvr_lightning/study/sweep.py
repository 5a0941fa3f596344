"""`sweep`: a config over learning rates, seeds or any other settings; one process and one JSON record per run.

A sweep file::

    name: tiny
    configs:                                   # label: the configs that `fit` gets, in order
      sgd: [sgd.yaml]
      adamw: [adamw.yaml]
    settings:                                  # by label, what its runs have in common
      adamw: {model.init_args.warmup_steps: 5}
    grid:                                      # by label, setting: values; all combinations are run
      sgd: {model.init_args.optimizer.init_args.lr: [0.1, 0.3, 1.0]}
      adamw: {model.init_args.optimizer.init_args.lr: [1.0e-5, 1.0e-4]}
    seeds: [0, 1, 2]                           # given as --seed_everything
    overrides: {trainer.max_steps: 60}         # the same for every run
    metrics: [val/arithmetic/pass@1]           # kept with their curves; the first one is compared
    parallel: 2                                # runs at a time
    threads: 1                                 # OMP_NUM_THREADS of each
    out: results/tiny                          # records/*.json and runs/*/
    keep_checkpoints: true                     # false: a run that ended well keeps its logs only

A run that has a record is not run again, unless it failed or its command changed. A failed run is a record too. Metrics
that are added later are read from the logs of the runs that are done.

With `--lr` the config is one that `fit` takes, and its learning rate is what is swept; settings of `fit` may follow:

    python -m rlvr_lightning sweep --config sgd.yaml --lr 1e-3..10 --seeds 0,1 --trainer.max_steps 60
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys

from rlvr_lightning.configuration import find_config
from rlvr_lightning.study.plan import Sweep, lr_sweep, read_sweep
from rlvr_lightning.study.rates import lines
from rlvr_lightning.study.records import cells, load_records
from rlvr_lightning.study.running import of_sweep, pending, reread, run_all


def tell(sweep: Sweep) -> None:
    """Table, advice on rates and figures of the sweep's records."""
    from rlvr_lightning.study.tables import print_table

    records = of_sweep(sweep)
    if others := len(load_records(sweep.folder)) - len(records):
        print(f"left out: {others} records in {sweep.folder} are of other runs; `plots {sweep.folder}` shows all")
    print_table(records, sweep.metrics[:3])
    for line in lines(cells(records), sweep.metrics[0]):
        print(line.advice())
    if importlib.util.find_spec("matplotlib") is None:
        print("no figures: matplotlib is missing (pip install 'rlvr-lightning[plot]')")
    elif any(record["status"] == "ok" for record in records):
        from rlvr_lightning.study.plots import draw

        print("drawn:", *draw(sweep.folder, records, []))


def main(argv: list[str]) -> int:
    """Run a sweep; exit status 1 if any run failed."""
    parser = argparse.ArgumentParser(prog="python -m rlvr_lightning sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="the sweep file (with --lr: the run's), here or packaged")
    parser.add_argument("--redo", action="store_true", help="run everything again")
    parser.add_argument("--dry_run", action="store_true", help="print the commands that would run")
    rates = parser.add_argument_group("learning rates of one config")
    rates.add_argument("--lr", metavar="LOW..HIGH", help="sweep them over decades, such as 1e-3..10; or a,b,c")
    rates.add_argument("--per_decade", type=int, default=2, metavar="N", help="rates in each decade (default 2)")
    rates.add_argument("--seeds", default="0", metavar="A,B", help="seeds of each rate (default 0)")
    rates.add_argument("--metric", default="reward/mean", help="what is compared (default reward/mean)")
    rates.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    rates.add_argument("--out", default="", metavar="DIR", help="folder of records (default runs/CONFIG_lr)")
    options, settings = parser.parse_known_args(argv)
    try:
        if settings and not options.lr:
            raise ValueError(f"unknown {shlex.join(settings)}; settings of fit go into the sweep file")
        sweep = lr_sweep(options, settings) if options.lr else read_sweep(find_config(options.config))
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    todo, warnings = pending(sweep, options.redo)
    print("".join(f"warning: {line}\n" for line in warnings), end="", file=sys.stderr)
    if options.dry_run:
        commands = [shlex.join(run.command(sweep.folder / "runs" / run.key)) for run in todo]
        print("\n".join(commands) or f"nothing to do: all runs have their records in {sweep.folder}")
        return 0
    print(f"{sweep.name}: {len(todo)} runs to do, {sweep.parallel} at a time, records in {sweep.folder}", flush=True)
    if changed := reread(sweep):
        print(f"{changed} records: metrics that the sweep names now were read from the runs' logs")
    try:
        failures = run_all(sweep, todo)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tell(sweep)
    return 1 if failures else 0
