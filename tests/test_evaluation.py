"""What validation finds of a model, what it writes down of each problem, and how a rerun goes on from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlvr_lightning.__main__ import main
from rlvr_lightning.checkpoint import DeltaCheckpointIO
from rlvr_lightning.data.arithmetic import Arithmetic
from rlvr_lightning.data.identity import problem_id
from rlvr_lightning.data.prompts import PromptData, PromptSource
from rlvr_lightning.estimates import majority, pass_at_k
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.evaluation_table import aligned, table
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.metrics import Estimate
from rlvr_lightning.problem_file import read_rows
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rewards.base import Reward
from rlvr_lightning.rewards.by_field import ByField
from rlvr_lightning.rewards.choice import Choice
from rlvr_lightning.rewards.match import ExactMatch, NumericMatch
from rlvr_lightning.rewards.math_answer import MathAnswer
from rlvr_lightning.rewards.score import score
from rlvr_lightning.rewards.tasks import TaskReward
from rlvr_lightning.schema import Rollouts, Sample, Sampling

WORKER = Path(__file__).with_name("metrics_worker.py")


class Short(Reward):
    """Whether the completion has few characters: names no answers."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.text) < 20) for sample in samples]


class Capricious(FinalAnswer):
    """Fails on completions that begin with +."""

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if any(sample.text.startswith("+") for sample in samples):
            raise RuntimeError("I do not like +")
        return super().__call__(samples)


class Answerless(PromptSource):
    def __init__(self, num: int = 3) -> None:
        self.records = [{"prompt": f"1{i}+1="} for i in range(num)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def benchmarks(short: int = 7, long: int = 5) -> dict[str, PromptSource]:
    return {"short": Arithmetic(short, split="val", levels=[1]), "long": Arithmetic(long, split="val", levels=[4])}


def module(**settings) -> GRPO:
    defaults: dict[str, Any] = {"rewards": {"answer": FinalAnswer()}, "sampling": Sampling(max_tokens=40)}
    defaults |= {"optimizer": partial(torch.optim.SGD, lr=0.0), "evaluation": Evaluation(samples=5, k=[2, 5])}
    return GRPO("tiny", **defaults | settings)


def validated(folder: Path, val=None, val_batch: int = 4, keeps: bool = True, **trainer) -> GRPO:
    """A module after a validation in a folder; what is not the trainer's is the module's."""
    data = PromptData("tiny", val=val or benchmarks(), val_batch=val_batch)
    settings = {name: trainer.pop(name) for name in ("rewards", "evaluation", "seed", "batching") if name in trainer}
    made = module(**settings)
    made.keeps_problems = keeps
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(**quiet, default_root_dir=folder, **trainer).validate(made, data, verbose=False)
    return made


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "problems_val.jsonl").read_text().splitlines()]


def by_problem(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["benchmark"], row["index"]): row for row in rows}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GRPO]:
    folder = tmp_path_factory.mktemp("once")
    return folder, validated(folder)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What `metrics_worker` found on each rank, and `folder` that of its validation."""
    out = tmp_path_factory.mktemp("two")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", WORKER]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, out], env=environment, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {rank: json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)} | {"folder": out / "two"}


def test_estimates_are_those_of_the_rows(once: tuple[Path, GRPO]) -> None:
    folder, made = once
    rows = rows_of(folder)
    assert len(rows) == 12
    logged = made.trainer.callback_metrics
    for name in ("short", "long", "all"):
        mine = [row for row in rows if name in (row["benchmark"], "all")]
        tries = [row["sampled"] for row in mine]
        expected = {
            "greedy_pass@1": mean(float(row["greedy"]["correct"][0]) for row in mine),
            "pass@1": mean(row["pass_rate"] for row in mine),
            "pass@2": mean(pass_at_k(sum(each["correct"]), 5, 2) for each in tries),
            "pass@5": mean(float(any(each["correct"])) for each in tries),
            "maj@2": mean(
                mean(majority(each["answers"][at : at + 2], each["correct"][at : at + 2]) for at in (0, 2))
                for each in tries
            ),
            "maj@5": mean(majority(each["answers"], each["correct"]) for each in tries),
            "length_mean": mean(mean(each["lengths"]) for each in tries),
            "truncated_frac": mean(mean(map(float, each["truncated"])) for each in tries),
        }
        assert {what: each.mean for what, each in made.results[name].items()} == pytest.approx(expected)
        assert {what: float(logged[f"val/{name}/{what}"]) for what in expected} == pytest.approx(expected)
        for what, each in made.results[name].items():
            assert each.low <= each.mean <= each.high, what
            assert each.problems == len(mine)
    assert 0 < made.results["all"]["pass@1"].mean < 1
    written = json.loads((folder / "problems_val.json").read_text())["results"]
    assert written["long"]["pass@5"]["mean"] == made.results["long"]["pass@5"].mean


def test_a_row_says_what_became_of_its_problem(once: tuple[Path, GRPO]) -> None:
    folder, _ = once
    problems = Arithmetic(7, split="val", levels=[1])
    for row in rows_of(folder)[:7]:
        problem = problems[row["index"]]
        assert row["id"] == problem_id(problem["prompt"])
        sampled = row["sampled"]
        assert [answer == str(problem["answer"]) for answer in sampled["answers"]] == sampled["correct"]
        assert row["pass_rate"] == mean(map(float, sampled["correct"]))
        assert {len(values) for values in sampled.values()} == {5}
        assert {len(values) for values in row["greedy"].values()} == {1}
        assert "completions" not in sampled


def test_batches_change_nothing(once: tuple[Path, GRPO], tmp_path: Path) -> None:
    again = validated(tmp_path, val_batch=9, batching=Batching(rollout_batch=7))
    assert by_problem(rows_of(tmp_path)) == by_problem(rows_of(once[0]))
    assert again.results == once[1].results


def test_two_processes_answer_alike(once: tuple[Path, GRPO], two_processes: dict[Any, Any]) -> None:
    assert by_problem(rows_of(two_processes["folder"])) == by_problem(rows_of(once[0]))
    written = [json.loads((at / "problems_val.json").read_text()) for at in (two_processes["folder"], once[0])]
    assert written[0] == written[1], "weights have the same digest, sharded or not"


def test_metrics_over_two_processes_are_those_of_one(two_processes: dict[Any, Any]) -> None:
    one = two_processes[0]["alone"]
    assert one["policy/kl"] == pytest.approx(0.1 / 3)
    assert len(one) == 12
    for rank in (0, 1):
        for how in ("ours", "torchmetrics", "one has all", "one has all, torchmetrics"):
            found = two_processes[rank][how]
            assert found.keys() == one.keys()
            for name, value in one.items():
                assert found[name] == pytest.approx(value, abs=1e-12), (rank, how, name)


def test_benchmarks_do_not_share_their_luck(tmp_path: Path) -> None:
    same = {name: Arithmetic(7, split="val", levels=[3]) for name in ("one", "other")}
    validated(tmp_path, val=same)
    found = by_problem(rows_of(tmp_path))
    assert any(found["one", i]["sampled"] != found["other", i]["sampled"] for i in range(7))
    assert all(found["one", i]["greedy"] == found["other", i]["greedy"] for i in range(7))


class Counting:
    """An engine that counts the prompts it is given, and may break off."""

    def __init__(self, engine: Any, limit: float) -> None:
        self.engine, self.limit, self.prompts = engine, limit, 0

    def generate(self, prompts, group, sampling, seeds) -> Rollouts:
        self.prompts += len(prompts)
        if self.prompts > self.limit:
            raise KeyboardInterrupt
        return self.engine.generate(prompts, group, sampling, seeds)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    """The engines made from now on; the attribute `limit` of the class breaks them off."""
    made: list[Counting] = []
    configure = GRPO.configure_model

    def wrapped(self: GRPO) -> None:
        configure(self)
        if not isinstance(self.engine, Counting):
            self.engine = Counting(self.engine, GRPO.limit)  # type: ignore[attr-defined,assignment]
            made.append(self.engine)

    monkeypatch.setattr(GRPO, "limit", float("inf"), raising=False)
    monkeypatch.setattr(GRPO, "configure_model", wrapped)
    return made


def test_an_interrupted_evaluation_goes_on(
    once: tuple[Path, GRPO], tmp_path: Path, counted: list[Counting], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(GRPO, "limit", 20)  # two batches of 4 problems, greedy and sampled, and a part of the third
    with pytest.raises(SystemExit):
        validated(tmp_path)
    assert len(rows_of(tmp_path)) == 8
    with (tmp_path / "problems_val.jsonl").open("a") as file:
        file.write('{"id": "cut sho')
    monkeypatch.setattr(GRPO, "limit", float("inf"))
    capsys.readouterr()
    again = validated(tmp_path)
    assert "8 problems are done already" in (said := capsys.readouterr().out)
    assert "damaged lines: 1" in said
    assert counted[-1].prompts == 2 * 4
    assert again.results == once[1].results
    assert by_problem(rows_of(tmp_path)) == by_problem(rows_of(once[0]))
    validated(tmp_path)
    assert counted[-1].prompts == 0


def test_an_interruption_says_what_is_kept(tmp_path: Path, counted: list[Counting], monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GRPO, "limit", 10)  # a batch of 4 problems, greedy and sampled, and a part of the second
    few = ["--data.val.short.num=4", "--data.val.long.num=4", "--data.val_batch=4", "--trainer.accelerator=cpu"]
    with pytest.raises(SystemExit):
        main(["validate", "--config", "bench.yaml", *few])
    kept = "interrupted: 4 problems are kept in runs/bench/version_0/problems_val.jsonl; the same command goes on"
    assert kept in capsys.readouterr().err


def test_only_what_changed_is_measured_again(tmp_path: Path, counted: list[Counting]) -> None:
    validated(tmp_path)
    more = validated(tmp_path, val=benchmarks(short=9))  # other problems under the same numbers, and two more
    unchanged = sum(a == b for a, b in zip(benchmarks()["short"], benchmarks(short=9)["short"], strict=False))
    assert counted[-1].prompts == 2 * (9 - unchanged)
    assert more.results["all"]["pass@1"].problems == 14


def test_another_right_answer_is_another_problem(tmp_path: Path, counted: list[Counting]) -> None:
    class Corrected(Answerless):
        def __init__(self, *answers: int) -> None:
            super().__init__(len(answers))
            self.records = [record | {"answer": answers[i]} for i, record in enumerate(self.records)]

    validated(tmp_path, val={"mine": Corrected(11, 12, 14)})
    again = validated(tmp_path, val={"mine": Corrected(11, 12, 13)})
    assert counted[-1].prompts == 2
    assert again.results["mine"]["greedy_pass@1"].mean == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed changed from 0 to 1"),
        ({"evaluation": Evaluation(samples=3)}, "sampled.completions changed from 5 to 3"),
        ({"rewards": {"answer": FinalAnswer(marker="answer")}}, "verifier changed from"),
    ],
)
def test_a_changed_setting_begins_anew(
    tmp_path: Path, counted: list[Counting], capsys, change: dict, said: str
) -> None:
    few = {"short": Arithmetic(3, split="val", levels=[1])}
    validated(tmp_path, val=few)
    validated(tmp_path, val=few, **change)
    assert f"measuring anew: since {tmp_path / 'problems_val.jsonl'}, {said}" in capsys.readouterr().out
    assert counted[-1].prompts == 6


def test_other_weights_begin_anew(tmp_path: Path, counted: list[Counting], capsys, monkeypatch) -> None:
    few = {"short": Arithmetic(3, split="val", levels=[1])}
    validated(tmp_path, val=few)
    load = GRPO.load_model

    def nudged(self: GRPO, empty: bool = False):
        model = load(self, empty)
        next(model.parameters()).data[0, 0] += 1
        return model

    monkeypatch.setattr(GRPO, "load_model", nudged)
    validated(tmp_path, val=few)
    assert "weights changed from" in capsys.readouterr().out
    assert counted[-1].prompts == 6


def test_a_sibling_run_is_found_by_its_settings(tmp_path: Path, counted: list[Counting]) -> None:
    few = {"short": Arithmetic(3, split="val", levels=[1])}
    for version, seed in enumerate((1, 0, 1, 0)):
        validated(tmp_path / f"version_{version}", val=few, seed=seed)
    assert [engine.prompts for engine in counted] == [6, 6, 0, 0]
    assert rows_of(tmp_path / "version_3") == rows_of(tmp_path / "version_1") != rows_of(tmp_path / "version_2")


def test_completions_are_kept_on_demand(tmp_path: Path) -> None:
    few = {"short": Arithmetic(3, split="val", levels=[1])}
    validated(tmp_path, val=few, evaluation=Evaluation(samples=2, completions=True))
    for row in rows_of(tmp_path):
        for text, answer in zip(row["sampled"]["completions"], row["sampled"]["answers"], strict=True):
            assert answer is None or text.endswith(f"answer {answer}")


def test_without_samples_the_greedy_completion_is_all(tmp_path: Path) -> None:
    made = validated(tmp_path, evaluation=Evaluation(samples=0))
    assert list(made.results["short"]) == ["greedy_pass@1", "length_mean", "truncated_frac"]
    assert all(row["pass_rate"] == float(row["greedy"]["correct"][0]) for row in rows_of(tmp_path))


def test_a_verifier_without_answers_counts_no_votes(tmp_path: Path) -> None:
    made = validated(tmp_path, rewards={"short": Short()})
    assert not [name for name in made.results["all"] if name.startswith("maj")]
    assert "no majorities of short, long: the verifier names no answers to vote with" in made.report()


def test_each_benchmark_may_have_a_verifier_of_its_own(once: tuple[Path, GRPO], tmp_path: Path, capsys) -> None:
    verifiers = ByField({"short": Short(), "long": FinalAnswer()})
    made = validated(tmp_path, rewards={"answer": verifiers})
    assert made.results["long"] == once[1].results["long"]
    assert "maj@5" not in made.results["short"].keys() | made.results["all"].keys()
    lines = made.report().splitlines()
    assert [line.split().count("-") for line in lines[1:4]] == [2, 0, 2]
    assert "no majorities of short: the verifier names no answers" in lines[-2]
    rows = [row["sampled"] for row in rows_of(tmp_path) if row["benchmark"] == "short"]
    assert not any("answers" in row for row in rows), "also where a batch holds problems of both"
    assert all(
        right == (length < 20) for row in rows for right, length in zip(row["correct"], row["lengths"], strict=True)
    )
    validated(tmp_path, rewards={"answer": ByField({"short": Short(), "long": FinalAnswer(marker="answer")})})
    assert "verifier changed from" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"data.val.long: .* benchmark: 'long' has no reward among short"):
        validated(tmp_path, rewards={"answer": ByField({"short": Short()})})


def test_in_fit_nothing_is_written(tmp_path: Path) -> None:
    validated(tmp_path, keeps=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plugins", [[], [DeltaCheckpointIO()]], ids=["ordinary", "delta"])
def test_a_checkpoint_is_measured_as_the_weights_it_holds(tmp_path: Path, plugins: list[Any]) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data = PromptData("tiny", train=Arithmetic(8, levels=[3]), val=benchmarks(), prompts_per_step=8)
    made = module(optimizer=partial(torch.optim.SGD, lr=1.0), group_size=4)
    trainer = Trainer(**quiet, default_root_dir=tmp_path, max_steps=1, limit_val_batches=0, plugins=plugins)
    trainer.fit(made, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    found = []
    for folder, measured, path in [("live", made, None), ("read", module(), str(tmp_path / "one.ckpt"))]:
        measured.keeps_problems = True
        reader = Trainer(**quiet, default_root_dir=tmp_path / folder, plugins=[DeltaCheckpointIO()])
        reader.validate(measured, data, ckpt_path=path, verbose=False)
        found.append((rows_of(tmp_path / folder), measured.evaluation_settings()["weights"]))
    assert found[0] == found[1]
    validated(tmp_path / "start")
    assert rows_of(tmp_path / "start") != found[0][0]


def test_the_packaged_benchmarks_and_their_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--data.test.short.num=4", "--data.test.long.num=4", "--model.evaluation.k=[2]", "--trainer.accelerator=cpu"]
    for seed in (0, 1):
        assert main(["test", "--config", "bench.yaml", *few, f"--seed_everything={seed}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heading = next(k for k, line in enumerate(lines) if line.split()[:2] == ["problems", "greedy"])
    assert lines[heading].split() == ["problems", "greedy", "pass@1", "pass@2", "maj@2", "tokens", "cut"]
    assert [line.split()[:2] for line in lines[heading + 1 : heading + 4]] == [
        ["short", "4"],
        ["long", "4"],
        ["all", "8"],
    ]
    assert main(["compare", "runs/bench/version_0", "runs/bench/version_1"]) == 0
    assert "not measured alike: from A to B seed changed from 0 to 1" in capsys.readouterr().out


# ---- mistakes ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 4, "k": [1, 8]}, "evaluation.k: pass@8 needs 8 samples, but evaluation.samples is 4"),
        ({"samples": 4, "k": [0]}, "evaluation.k holds numbers of samples, at least 1, got 0"),
        ({"samples": -1}, r"evaluation.samples must be 0 \(greedy only\) or more, got -1"),
        ({"sampling": Sampling(temperature=0)}, "evaluation.sampling.temperature must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)


def test_a_benchmark_without_answers_is_refused_before_anything_is_sampled(
    tmp_path: Path, counted: list[Counting]
) -> None:
    with pytest.raises(ValueError, match=r"data.val.mine: its problems cannot be judged: answer: KeyError: 'answer'"):
        validated(tmp_path, val=benchmarks() | {"mine": Answerless()})
    assert counted[-1].prompts == 0


def test_an_empty_benchmark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.val.none is empty: give it at least one prompt"):
        validated(tmp_path, val={"none": Answerless(0)})


def test_nothing_to_validate_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.val is missing: name at least one source of prompts to validate on"):
        Trainer(logger=False, default_root_dir=tmp_path).validate(module(), PromptData("tiny"), verbose=False)


def test_failures_of_the_verifier_are_counted(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validated(tmp_path, rewards={"answer": Capricious()}, keeps=False)
    told = [str(each.message) for each in caught if "verifier failed" in str(each.message)]
    failed = len((tmp_path / "reward_failures.jsonl").read_text().splitlines())
    assert told == [
        f"the verifier failed on {failed} completions, which count as wrong; see {tmp_path}/reward_failures.jsonl"
    ]
    assert failed > 0


# ---- answers and tables ----


@pytest.mark.parametrize(
    ("reward", "texts", "answers"),
    [
        (FinalAnswer(), ["answer 07", "answer 7 ", "answer x", "7"], ["7", "7", None, None]),
        (ExactMatch(), ["New  York", "new york", ""], ["new york", "new york", None]),
        (NumericMatch(), ["1,200.0", "1.2e3", "-0", "0", "many"], ["1200", "1200", "0", "0", None]),
        (Choice(), ["Answer: (B)", "answer: B.", "Answer: A or B"], ["B", "B", None]),
        (TaskReward(), [" 7\nbut 8", "7"], ["7", "7"]),
        (
            MathAnswer(),
            [r"\boxed{\frac{2}{4}}", r"\boxed{1/2}", r"\boxed{x + 1}", r"\boxed{x+1}.", r"\boxed{\text{North}}", "1/2"],
            ["1/2", "1/2", "x+1", "x+1", "north", None],
        ),
    ],
)
def test_equal_answers_are_one_text(reward: Reward, texts: list[str], answers: list[str | None]) -> None:
    samples = [Sample(prompt="", text=text, token_ids=[], record={"answer": "1"}) for text in texts]
    assert [reward.answer(sample) for sample in samples] == answers
    assert reward.names_answers({})


def test_answers_of_the_first_reward_are_kept_and_replaced() -> None:
    def scored(*texts: str):
        samples = [Sample(prompt="", text=text, token_ids=[], record={"answer": 1}) for text in texts]
        return score({"answer": FinalAnswer(), "short": Short()}, {}, samples)

    first = scored("answer 1", "answer 2", "none")
    assert first.answers == ["1", "2", None]
    assert first.with_replaced(torch.tensor([2, 0]), scored("answer 3", "")).answers == [None, "2", "3"]


def test_the_table_lines_up_and_says_what_an_interval_hides() -> None:
    wide = {"greedy_pass@1": Estimate(1.0, 1.0, 1.0, 30), "length_mean": Estimate(1234.5, 1.0, 2.0, 30)}
    narrow = {"greedy_pass@1": Estimate(0.05, 0.0, 0.125, 5), "length_mean": Estimate(9.0, 1.0, 2.0, 5)}
    text = table({"a_long_name": wide, "b": narrow})
    heading, *rows, note, sure = text.splitlines()
    assert {len(line) for line in (heading, *rows)} == {len(heading)}
    assert rows[0].split() == ["a_long_name", "30", "100.0", "[100,", "100]", "1234.5"]
    assert "95 % intervals" in note
    assert "3 / problems" in sure
    assert "3 / problems" not in table({"b": narrow})
    assert aligned([["a", "b"]]) == "a  b"


def test_rows_that_are_none_are_counted(tmp_path: Path) -> None:
    good = {"id": "a", "benchmark": "b", "index": 0, "record": "c", "greedy": {"correct": [True]}}
    lines = [json.dumps(good), "{}", "nonsense", json.dumps(good | {"greedy": {"correct": []}}), json.dumps([1])]
    (tmp_path / "problems_val.jsonl").write_text("\n".join(lines))
    assert read_rows(tmp_path / "problems_val.jsonl") == ([good], 4)
