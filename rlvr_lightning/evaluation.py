"""Validation and testing of a policy on benchmarks: greedy and sampled accuracy, with what is known of its error.

Of every benchmark, and of `all` problems together where there are several:

    greedy_pass@1     share of problems that the greedy completion gets right
    pass@1, pass@k    chance that one of 1 or k sampled completions is right, estimated without bias
    maj@k             accuracy of the most frequent answer among k sampled completions, where the verifier names answers
    length_mean       tokens of a completion: of the sampled ones, or of the greedy one where none are sampled
    truncated_frac    share of these that the length limit cut

The draws depend on the seed, the problem and the number of the sample alone: not on batches or ranks, and they are the
same at every validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.checkpoint.start import digest_of
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.evaluation_table import Results, as_json, table
from rlvr_lightning.metrics import Attempts
from rlvr_lightning.problem_file import ProblemFile, Row, add_attempts, attempts, key_of, new_row
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.schema import RolloutEngine, Sampling
from rlvr_lightning.scoring import Scorer
from rlvr_lightning.seeds import derive_seed
from rlvr_lightning.strategy import Layout
from rlvr_lightning.trainer_checks import check_strategy

Record = dict[str, Any]
Found = list[tuple[int, dict[str, Attempts]]]
"""Of numbered problems, what was tried in each mode."""


class Drawn(NamedTuple):
    """A completion and what is known of it."""

    text: str
    """As drawn: a stop string that ended it is in it."""
    right: bool
    truncated: bool


class Evaluated(LightningModule):
    """What a module with an engine and a verifier measures of its data module's problems; the first reward verifies."""

    engine: RolloutEngine
    scorer: Scorer
    sampling: Sampling
    layout: Layout
    evaluation: Evaluation
    seed: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keeps_problems = False
        """Write what is found of each problem to the run's folder, and go on from what an earlier run found."""
        self.results: Results = {}
        """Of the last validation or test."""
        self.draws = 8
        """Completions of each problem in prediction."""
        self._split = "val"
        self._served = 0  # problems, of all ranks
        self.failed = 0
        """Completions of this rank on which the verifier failed, since the last evaluation began."""
        self._found: dict[str, Found] = {}  # of this rank, by benchmark
        self._votes: dict[str, bool] = {}  # by benchmark, whether its verifier names answers
        self._file: ProblemFile | None = None

    @property
    def ranks(self) -> Ranks:
        """Processes that share a batch."""
        return self.layout.data

    @property
    def run_folder(self) -> Path:
        """Of the first rank's loggers; all ranks must ask together."""
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    @property
    def failures_file(self) -> Path:
        """Where completions go that made a reward fail."""
        return self.run_folder / "reward_failures.jsonl"

    def setup(self, stage: str) -> None:
        """Refuse to validate on nothing, which a fit may do without, and processes that would all do the same."""
        super().setup(stage)
        check_strategy(self.trainer)
        if stage == "validate" and not getattr(self.trainer.datamodule, "val", True):  # type: ignore[attr-defined]
            raise ValueError("data.val is missing: name at least one source of prompts to validate on")

    def on_validation_epoch_start(self) -> None:
        """Look at the problems before anything is computed."""
        self._begin("val", self.trainer.val_dataloaders)

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self._begin("test", self.trainer.test_dataloaders)

    def validation_step(self, batch: list[Record], batch_idx: int) -> None:
        """Answer the problems of the batch."""
        self._evaluate(batch)

    def test_step(self, batch: list[Record], batch_idx: int) -> None:
        """As `validation_step`, on the test problems."""
        self._evaluate(batch)

    def predict_step(self, batch: list[Record], batch_idx: int) -> list[list[Drawn]]:
        """Answers to this rank's share of the problems, `draws` to each, and what the verifier says of them."""
        share = batch[self.ranks.rank :: self.ranks.size]
        prompts = [record["prompt_ids"] for record in share]
        seeds = [derive_seed(self.seed, "samples", record["index"]) for record in share]
        rollouts = self.engine.generate(prompts, self.draws, self.sampling, seeds)
        scores = self.layout.tensor.first(self.scorer.verifier(rollouts, share, self.failures_file))
        self.failed += scores.failed
        _, texts = self.scorer.drawn(rollouts)
        marks, cut = scores.total.tolist(), rollouts.truncated.tolist()
        drawn = [Drawn(text, mark >= 1, was) for text, mark, was in zip(texts, marks, cut, strict=True)]
        return [drawn[at : at + self.draws] for at in range(0, len(drawn), self.draws)]

    def on_validation_epoch_end(self) -> None:
        """Log `val/<benchmark>/greedy_pass@1` and the others."""
        self.results = self._estimates()
        main, last = "pass@1" if self.evaluation.samples else "greedy_pass@1", next(reversed(self.results), None)
        for name, found in self.results.items():
            for what, estimate in found.items():
                self.log(f"{self._split}/{name}/{what}", estimate.mean, prog_bar=(name, what) == (last, main))
        if failed := sum(self.ranks.gather(self.failed)):
            rank_zero_warn(
                f"the verifier failed on {failed} completions, which count as wrong; see {self.failures_file}"
            )
        if self._file is not None and self.trainer.is_global_zero:
            self._file.describe(as_json(self.results))

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self.on_validation_epoch_end()

    def report(self) -> str:
        """What was found, for people; on the first rank."""
        assert self._file is not None
        silent = [name for name, votes in self._votes.items() if not votes] if self.evaluation.several else []
        said = f"no majorities of {', '.join(silent)}: the verifier names no answers to vote with\n" if silent else ""
        return f"{table(self.results)}\n{said}problems: {self._file.path}"

    def interrupted(self) -> str:
        """What is kept of an evaluation that did not end; nothing if it had not begun."""
        if self._file is None:
            return ""
        kept = f"{self._file.kept} problems are kept in {self._file.path}"
        return f"interrupted: {kept}; the same command goes on from there"

    def _begin(self, split: str, loader: Any) -> None:
        self._split, self._served, self.failed, self._found, self._votes, self._file = split, 0, 0, {}, {}, None
        problems = self._check(getattr(loader, "records", []))
        if not self.keeps_problems or not problems:
            return
        self._file = ProblemFile(self.run_folder / f"problems_{split}.jsonl", self.evaluation_settings())
        if self.trainer.is_global_zero:
            self._file.start()
            bar = self.trainer.progress_bar_callback
            print(self._file.told, flush=True) if bar is None else bar.print(self._file.told)
        self._file.rows = self.layout.tensor.first(self.ranks.first(self._file.rows))

    def _check(self, records: Sequence[Record]) -> int:
        """How many problems there are; ValueError for a benchmark whose problems the verifier cannot judge."""
        for name in dict.fromkeys(record["benchmark"] for record in records):
            first = next(record for record in records if record["benchmark"] == name)
            if error := self.scorer.why_not_judged(first):
                raise ValueError(f"data.{self._split}.{name}: its problems cannot be judged: {error}")
        return len(records)

    def evaluation_settings(self) -> dict[str, Any]:
        """All that decides what is found of a problem, code apart; by name, for JSON. All ranks must ask together."""
        found = {
            "weights": digest_of(dict(self.named_parameters()), self.layout.shards)[:16],
            "arithmetic": f"{getattr(self, 'compute_dtype', 'auto')} on {self.device.type}, {self.trainer.precision}",
            "engine": type(self.engine).__name__,
            "seed": self.seed,
            "stop": self.scorer.stop,
            "verifier": self.scorer.verifier.settings(),
            "completions": self.evaluation.completions,
        }
        for mode, (how, num) in self.evaluation.modes(self.sampling).items():
            found |= {f"{mode}.{name}": value for name, value in (asdict(how) | {"completions": num}).items()}
        return found

    def _evaluate(self, batch: list[Record]) -> None:
        numbered = list(enumerate(batch, self._served))
        self._served += len(batch)
        known = self._file.rows if self._file is not None else {}
        keys = {number: key_of(record) for number, record in numbered} if known else {}
        done = [(number, known[keys[number]]) for number in keys if keys[number] in known]
        todo = [(number, record) for number, record in numbered if keys.get(number) not in known]
        mine, share = done[self.ranks.rank :: self.ranks.size], todo[self.ranks.rank :: self.ranks.size]
        if todo:  # an engine may need all ranks, also those without a share
            rows = self._answer([record for _, record in share])
            mine += [(number, row) for (number, _), row in zip(share, rows, strict=True)]
            self._keep(rows)
        for name in dict.fromkeys(record["benchmark"] for record in batch):
            found = [(number, attempts(row)) for number, row in mine if row["benchmark"] == name]
            self._found.setdefault(name, []).extend(found)
            if name not in self._votes:
                first = next(record for record in batch if record["benchmark"] == name)
                self._votes[name] = self.scorer.names_answers(first)

    def _answer(self, records: list[Record]) -> list[Row]:
        """A row for each problem."""
        prompts = [record["prompt_ids"] for record in records]
        # Of each benchmark others, or its problems would share their luck with another's of the same index.
        seeds = [derive_seed(self.seed, -1, record["benchmark"], record["index"]) for record in records]
        rows = [new_row(record) for record in records]
        verifier = self.scorer.verifier
        for mode, (sampling, num) in self.evaluation.modes(self.sampling).items():
            rollouts = self.engine.generate(prompts, num, sampling, seeds)
            scores = self.layout.tensor.first(verifier(rollouts, records, self.failures_file))
            texts = [s.text for s in verifier.samples(rollouts, records)] if self.evaluation.completions else []
            self.failed += scores.failed
            add_attempts(rows, mode, rollouts, scores, texts)
        for record, row in zip(records, rows, strict=True):
            if not verifier.names_answers(record):
                for mode in self.evaluation.modes(self.sampling):
                    row[mode].pop("answers", None)  # that other problems of the batch have
        return rows

    def _keep(self, rows: list[Row]) -> None:
        if self._file is not None:
            everyones = [row for part in self.ranks.gather(rows) for row in part]
            if self.trainer.is_global_zero:
                self._file.append(everyones)

    def _estimates(self) -> Results:
        groups = dict(self._found)
        if len(groups) > 1:
            groups.setdefault("all", [pair for pairs in groups.values() for pair in pairs])
        results: Results = {}
        for name, pairs in groups.items():
            results[name] = {}
            votes = self._votes.get(name, all(self._votes.values()))
            for what, (mode, metric) in self.evaluation.measures(self.ranks, votes).items():
                metric.update([number for number, _ in pairs], [tries[mode] for _, tries in pairs])
                results[name][what] = metric.compute()
        return results
