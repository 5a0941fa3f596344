"""`python -m rlvr_lightning samples`: texts to learn from, out of a policy's own completions and what a verifier says.

samples --config sgd.yaml --out pairs.jsonl --kind pairs                  # for DPO, IPO, SimPO, ORPO
samples --config sgd.yaml --out labels.jsonl --kind labels                # for KTO
samples --config sgd.yaml --out correct.jsonl --kind correct --num 1000   # for SFT: rejection sampling

The config is a run's: its policy (of `--ckpt_path`, if given) answers its training problems, each `n` times, and its
first reward says what is right. Completions that are cut by the length limit, or were drawn for the problem before, are
left out and counted. A text that a string of `model.stop` ended has that string: learn from it with the same
`model.stop`, or the end-of-sequence token is put behind.

    pairs     a right completion as `chosen` and a wrong one as `rejected`, as many as the problem has of both
    labels    every completion with `label`: true if it is right
    correct   the right completions
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from rlvr_lightning.cli import RLVRCLI, run
from rlvr_lightning.data.prompts import PromptData, PromptLoader
from rlvr_lightning.evaluation import Drawn, Evaluated

Kind = Literal["pairs", "labels", "correct"]
Line = dict[str, Any]
COLUMNS = {"pairs": "pairs", "labels": "completions with labels", "correct": "right completions"}


def main(argv: list[str]) -> int:
    """Draw, verify, write; returns the exit status."""
    return run(["predict", *argv], SamplesCLI)


class SamplesCLI(RLVRCLI):
    """The CLI of a run, with what to draw and where to write it."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Prediction, by another name."""
        return {"predict": LightningCLI.subcommands()["predict"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What `samples` adds."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--out", type=str | None, default=None, help="The JSONL file to write; must not exist.")
        parser.add_argument("--kind", type=Kind | None, default=None, help="What to write.")
        parser.add_argument("--n", type=int, default=8, help="Completions of each problem.")
        parser.add_argument("--num", type=int, default=None, help="Take the first so many problems; all by default.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, without logs or a run folder: nothing is trained."""
        self.save_config_callback = None
        self.config_init[self.subcommand]["trainer"]["logger"] = False
        return super().instantiate_trainer(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Draw and write."""
        out, kind, n, num = (self._get(self.config, name) for name in ("out", "kind", "n", "num"))
        if out is None or kind is None:
            raise ValueError("samples needs --out FILE.jsonl and --kind pairs, labels or correct")
        check(self.model, self.datamodule, Path(out), kind, n, num)
        self.datamodule.setup("fit")
        records = self.datamodule.train_dataloader().records
        if num is not None and num > len(records):
            raise ValueError(f"--num: data.train has {len(records)} problems, fewer than {num}")
        if error := self.model.scorer.verifier.why_not_judged(records[0]):
            raise ValueError(f"data.train: its problems cannot be judged: {error}")
        self.model.draws = n
        writer = Writer(Path(out), kind)
        cast(Any, self.trainer).callbacks.append(writer)
        loader = PromptLoader(records[:num], self.datamodule.val_batch, seed=None)
        self.trainer.predict(self.model, loader, ckpt_path=kwargs.get("ckpt_path"), return_predictions=False)
        if self.trainer.is_global_zero:
            print(writer.finish())


def check(model: LightningModule, data: Any, out: Path, kind: Kind, n: int, num: int | None) -> None:
    """Raise ValueError for what cannot be drawn or written, before anything is loaded."""
    if not isinstance(model, Evaluated) or not model.scorer.rewards:
        raise ValueError("--config: samples needs model.rewards, of which the first says what is right")
    if not isinstance(data, PromptData):
        raise ValueError(f"--config: samples draws from PromptData, this is {type(data).__name__}")
    least = 2 if kind == "pairs" else 1
    if n < least:
        raise ValueError(f"--n must be at least {least} for {kind}, got {n}")
    if num is not None and num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    if out.exists():
        raise ValueError(f"--out: {out} exists; give another name, or remove it")


class Writer(Callback):
    """Writes lines as they are made, next to the file, which appears when all are there.

    Args:
        out: the file.
        kind: of lines.
    """

    def __init__(self, out: Path, kind: Kind) -> None:
        self.out, self.kind = out, kind
        self.partial = out.with_name(f"{out.name}.partial")
        self.counts: Counter[str] = Counter()
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file, before anything is drawn."""
        if trainer.is_global_zero:
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Sequence[Mapping[str, Any]],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write what all ranks have drawn, in the order of the problems."""
        assert isinstance(pl_module, Evaluated)
        shares = pl_module.ranks.gather(outputs)
        self.counts[FAILED] = sum(pl_module.ranks.gather(pl_module.failed))
        if self._file is None:
            return
        for number, record in enumerate(batch):
            drawn = [Drawn(*each) for each in shares[number % len(shares)][number // len(shares)]]
            for line in lines_of(record["prompt"], drawn, self.kind, self.counts):
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def finish(self) -> str:
        """Put the file in its place; says what is in it and what was left out.

        Raises:
            ValueError: there is nothing in it.
        """
        assert self._file is not None
        self._file.close()
        told = ", ".join(f"{self.counts[why]} {why}" for why in WHY if self.counts[why])
        left_out = f"; left out: {told}" if told else ""
        left_out += f"; taken to be wrong: {self.counts[FAILED]} {FAILED}" if self.counts[FAILED] else ""
        if not self.counts["lines"]:
            self.partial.unlink()
            raise ValueError(f"--out: there is nothing to write{left_out}")
        self.partial.replace(self.out)
        return (
            f"wrote {self.counts['lines']} {COLUMNS[self.kind]} of {self.counts['used']} problems out of "
            f"{self.counts['problems']} to {self.out}{left_out}"
        )


ALL_WRONG, ALL_RIGHT = "problems without a right completion", "problems without a wrong one"
FAILED = "completions on which the verifier failed (see reward_failures.jsonl)"
CUT, REPEATED, EMPTY, SPARE = "cut completions", "repeated ones", "empty ones", "ones without a counterpart"
WHY = (ALL_WRONG, ALL_RIGHT, CUT, REPEATED, EMPTY, SPARE)


def lines_of(prompt: str, drawn: Sequence[Drawn], kind: Kind, counts: Counter[str]) -> list[Line]:
    """The lines of a problem.

    Args:
        prompt: of the problem.
        drawn: its completions.
        kind: of lines.
        counts: what is written and left out; added to.

    Example:
        >>> two, cut = Drawn("2", True, False), Drawn("22", False, True)
        >>> drawn = [two, Drawn("3", False, False), two, cut]
        >>> counts = Counter()
        >>> lines_of("1+1=", drawn, "pairs", counts)
        [{'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}]
        >>> lines_of("1+1=", drawn[:1], "pairs", counts), counts[ALL_RIGHT], counts[REPEATED], counts[CUT]
        ([], 1, 1, 1)
    """
    whole = [each for each in drawn if not each.truncated]
    texts = {each.text: each.right for each in whole}
    distinct = {text: right for text, right in texts.items() if text.strip()}
    counts.update({CUT: len(drawn) - len(whole), REPEATED: len(whole) - len(texts), EMPTY: len(texts) - len(distinct)})
    right = [text for text, is_right in distinct.items() if is_right]
    wrong = [text for text, is_right in distinct.items() if not is_right]
    lines: list[Line] = []
    if kind == "labels":
        lines = [{"completion": text, "label": is_right} for text, is_right in distinct.items()]
    elif not right or (kind == "pairs" and not wrong):
        counts[ALL_RIGHT if right else ALL_WRONG] += 1
    elif kind == "correct":
        lines = [{"completion": text} for text in right]
    else:
        lines = [{"chosen": one, "rejected": other} for one, other in zip(right, wrong, strict=False)]
        counts[SPARE] += abs(len(right) - len(wrong))
    counts.update({"problems": 1, "used": bool(lines), "lines": len(lines)})
    return [{"prompt": prompt} | line for line in lines]
