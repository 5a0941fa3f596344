"""Engines beside the policy: which weights sample what, at once and one step ahead, and when requests are lost.

The client here holds a copy of the model, which changes by the updates alone, and samples with the embedded engine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlvr_lightning.data.arithmetic import Arithmetic
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.experience import Batching, Handling
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import TINY, Policy
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rollout import choose
from rlvr_lightning.rollout.ahead import Ahead
from rlvr_lightning.rollout.hf import HFEngine
from rlvr_lightning.rollout.vllm.engine import VLLMEngine
from rlvr_lightning.rollout.vllm.http import Lost
from rlvr_lightning.rollout.vllm.requests import Answer, Request
from rlvr_lightning.rollout.vllm.settings import VLLM
from rlvr_lightning.rollout.vllm.sync import Part, WeightSync
from rlvr_lightning.schema import Sampling

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def fingerprint(policy: Policy) -> float:
    return float(sum(p.double().abs().sum() for p in policy.parameters()))


class Twin:
    """A client that samples with a model of its own."""

    def __init__(self, policy: Policy, stops: list[int], pad: int) -> None:
        self.policy = Policy(copy.deepcopy(policy.model))
        self.engine = HFEngine(self.policy.model, stops, pad)
        self.sampled: list[float] = []
        self.lose: list[set[int]] = []
        """Places of requests to lose, call by call."""
        self.lose_updates = self.recovered = 0
        self.pause_s = 0.0

    def sample(self, requests: Sequence[Request], options: dict[str, Any]) -> dict[int, list[Answer]]:
        time.sleep(self.pause_s)
        self.sampled.append(fingerprint(self.policy))
        lost = self.lose.pop(0) if self.lose else set()
        settings = Sampling(max_tokens=options["max_tokens"], temperature=options["temperature"])
        found = {}
        for k, request in enumerate(requests):
            if k in lost:
                continue
            drawn = self.engine.generate([list(request.prompt)], request.num, settings, [request.seed])
            found[k] = [
                Answer(ids[mask].tolist(), logprobs[mask].tolist(), not bool(cut))
                for ids, mask, logprobs, cut in zip(
                    drawn.completion_ids, drawn.completion_mask, drawn.rollout_logprobs, drawn.truncated, strict=True
                )
            ]
        return found

    def update(self, parts: Iterator[Part]) -> int:
        size, held = 0, dict(self.policy.causal_lm.named_parameters())
        for part in parts:
            for name in part.shapes:
                if name in part.tensors:
                    held[name].data.copy_(part.tensors[name])
                else:
                    places = part.tensors[name + "/indices"].long()
                    held[name].data.view(-1)[places] = part.tensors[name + "/values"].to(held[name].dtype)
            size += part.nbytes
        if self.lose_updates:
            self.lose_updates -= 1
            raise Lost("in the middle")
        return size

    def recover(self) -> None:
        self.recovered += 1
        for parameter in self.policy.parameters():
            parameter.data.zero_()  # it may hold anything

    def digests(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        return dict(WeightSync(self.policy, torch.float32).digests())

    def load_adapter(self, save: Any) -> int:
        raise AssertionError("there are none")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Noted(GRPO):
    """Remembers its weights after each batch, and the prompts it learnt from."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.weights = [fingerprint(self.policy)]
        self.learnt: list[list[str]] = []
        self.lags: list[list[int]] = []

    def learn(self, experience: Any) -> None:
        super().learn(experience)
        self.weights.append(fingerprint(self.policy))
        self.learnt.append([sample["prompt"] for sample in self.last_samples[:: self.group_size]])
        self.lags.append([sample.get("staleness", 0) for sample in self.last_samples])


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> list[Twin]:
    made: list[Twin] = []

    def engine(policy: Policy, layout: Any, settings: VLLM, folder: str, stops: Any, *rest: Any) -> VLLMEngine:
        made.append(Twin(policy, *stops))
        return VLLMEngine(
            lambda: made[-1], WeightSync(policy, torch.float32), *stops, settings, 128, torch.device("cpu")
        )

    monkeypatch.setattr(choose, "vllm_engine", engine)
    monkeypatch.setattr("rlvr_lightning.grpo.vllm_engine", engine)
    monkeypatch.setattr(choose, "require_vllm", lambda settings: None)
    return made


def module(**settings: Any) -> Noted:
    defaults: dict[str, Any] = {
        "rewards": {"answer": FinalAnswer()},
        "optimizer": lambda parameters: SGD(parameters, lr=0.06),
        "group_size": 4,
        "sampling": Sampling(max_tokens=25),
        "evaluation": Evaluation(samples=0),
        "batching": Batching(micro_batch=24),
        "dtype": "bfloat16",
    }
    return Noted("tiny", **defaults | settings)


def fit(model: Noted, folder: Path, steps: int, **trainer: Any) -> Trainer:
    data = PromptData(
        str(TINY), train=Arithmetic(num=42), val={"a": Arithmetic(num=3, split="val")}, prompts_per_step=6
    )
    made = Trainer(max_steps=steps, accelerator="cpu", devices=1, default_root_dir=str(folder), **QUIET | trainer)
    made.fit(model, datamodule=data, ckpt_path=None)
    return made


def test_without_staleness_each_batch_is_of_the_weights_of_that_moment(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(check_every=1))
    fit(model, tmp_path, steps=4, limit_val_batches=0)
    assert twins[0].sampled == model.weights[:4]
    assert all(lags == [0] * 24 for lags in model.lags)


def test_one_step_ahead_each_batch_is_of_the_weights_before_the_last_update(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(mode="server", max_staleness=1, check_every=1))
    trainer = fit(model, tmp_path, steps=4, limit_val_batches=0)
    w = model.weights
    assert twins[0].sampled[:5] == [w[0], w[0], w[1], w[2], w[3]], "the fifth batch is not trained on"
    assert [lags[0] for lags in model.lags] == [0, 1, 1, 1] and trainer.global_step == 4
    assert len({tuple(prompts) for prompts in model.learnt}) == 4, "nothing is trained twice"
    data = PromptData(str(TINY), train=Arithmetic(num=42), prompts_per_step=6)
    data.setup("fit")
    served = [[record["prompt"] for record in batch] for batch in data.train_dataloader()]
    assert model.learnt == served[:4], "and nothing is left out"
    assert trainer.callback_metrics["rollout/staleness_mean"] == 1.0


def test_sampling_goes_on_while_training(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(mode="server", max_staleness=1))
    began: list[float] = []

    class Slow(Noted):
        def learn(self, experience: Any) -> None:
            began.append(time.monotonic())
            time.sleep(1.0)
            super().learn(experience)

    model.__class__ = Slow
    original = Twin.sample
    ended: list[float] = []

    def timed(self: Twin, requests: Any, options: Any) -> Any:
        found = original(self, requests, options)
        ended.append(time.monotonic())
        return found

    Twin.sample = timed  # type: ignore[method-assign]
    try:
        fit(model, tmp_path, steps=3, limit_val_batches=0)
    finally:
        Twin.sample = original  # type: ignore[method-assign]
    for k in (1, 2):  # the batch after was sampled within the time that the batch before took to learn
        assert began[k - 1] < ended[k] < began[k]


def test_validation_waits_for_what_is_under_way(twins: list[Twin], tmp_path: Path) -> None:
    """Its own weights are newer, and must not reach the engine before the batch is sampled."""
    model = module(rollout=VLLM(mode="server", max_staleness=1, check_every=1))
    fit(model, tmp_path, steps=3, val_check_interval=1, num_sanity_val_steps=0)
    w, sampled = model.weights, twins[0].sampled
    assert sampled[:3] == [w[0], w[0], w[0]], "the first batch, validation of the start, the second batch"
    assert sampled[3:6] == [w[1], w[1], w[2]], "validation after the first update; the third batch, before the next"


def test_lost_requests_are_sampled_again_and_only_these(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(check_every=1))
    plain = module(rollout=VLLM(check_every=1))
    fit(plain, tmp_path / "plain", steps=3, limit_val_batches=0)
    original = Twin.__init__

    def losing(self: Twin, *args: Any) -> None:
        original(self, *args)
        self.lose, self.lose_updates = [set(), {1, 4}, {0}, set()], 0

    Twin.__init__ = losing  # type: ignore[method-assign]
    try:
        fit(model, tmp_path / "losing", steps=3, limit_val_batches=0)
    finally:
        Twin.__init__ = original  # type: ignore[method-assign]
    assert twins[1].recovered == 2 and len(twins[1].sampled) == 5
    assert model.weights == plain.weights and model.learnt == plain.learnt, "the weights were the same, so all is"


def test_requests_lost_ahead_are_sampled_by_the_weights_of_now(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(mode="server", max_staleness=1, check_every=1))
    original = Twin.__init__

    def losing(self: Twin, *args: Any) -> None:
        original(self, *args)
        self.lose = [set(), set(), {2, 3}]

    Twin.__init__ = losing  # type: ignore[method-assign]
    try:
        fit(model, tmp_path, steps=4, limit_val_batches=0)
    finally:
        Twin.__init__ = original  # type: ignore[method-assign]
    assert model.lags[2] == [1] * 8 + [0] * 8 + [1] * 8
    assert twins[0].recovered == 1


def test_an_update_that_is_lost_is_followed_by_all_weights(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(check_every=1))
    original = Twin.update
    calls = []

    def update(self: Twin, parts: Any) -> int:
        calls.append(1)
        self.lose_updates = len(calls) == 2
        return original(self, parts)

    Twin.update = update  # type: ignore[method-assign]
    try:
        fit(model, tmp_path, steps=3, limit_val_batches=0)
    finally:
        Twin.update = original  # type: ignore[method-assign]
    assert twins[0].recovered == 1 and twins[0].sampled == model.weights[:3]


def test_a_client_that_never_answers_ends_the_run(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM())
    original = Twin.__init__

    def losing(self: Twin, *args: Any) -> None:
        original(self, *args)
        self.lose = [{0}] * 9

    Twin.__init__ = losing  # type: ignore[method-assign]
    try:
        with pytest.raises(RuntimeError, match="rollout: vLLM left prompts unfinished, 4 times"):
            fit(model, tmp_path, steps=2, limit_val_batches=0)
    finally:
        Twin.__init__ = original  # type: ignore[method-assign]


def test_a_resumed_run_samples_what_was_under_way_again(twins: list[Twin], tmp_path: Path) -> None:
    model = module(rollout=VLLM(mode="server", max_staleness=1))
    trainer = fit(model, tmp_path, steps=2, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert isinstance(model.ahead, Ahead)
    under_way = model.ahead.indices
    again = module(rollout=VLLM(mode="server", max_staleness=1))
    data = PromptData(str(TINY), train=Arithmetic(num=42), prompts_per_step=6)
    more = Trainer(
        max_steps=4, accelerator="cpu", devices=1, default_root_dir=str(tmp_path), limit_val_batches=0, **QUIET
    )
    more.fit(again, datamodule=data, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)
    data.setup("fit")
    prompts = {record["index"]: record["prompt"] for record in data.train_dataloader().records}
    assert again.learnt[0] == [prompts[index] for index in sorted(under_way)], "no prompt is lost"


def test_settings_that_cannot_work_together(twins: list[Twin]) -> None:
    for settings, message in (
        ({"max_staleness": 1}, "rollout.max_staleness: 1 needs rollout.mode: server"),
        ({"max_staleness": 2, "mode": "server"}, "rollout.max_staleness must be 0 or 1, got 2"),
        ({"urls": ["http://a:1"]}, "rollout.urls are of servers"),
        (
            {"mode": "server", "urls": ["http://node7:8000"]},
            "rollout.shared_folder: weights reach http://node7",
        ),
        ({"memory_frac": 1.0}, r"rollout.memory_frac must lie in \(0, 1\), got 1.0"),
        ({"kv_cache_gib": 0}, "rollout.kv_cache_gib must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            VLLM(**settings)
    with pytest.raises(ValueError, match=r"handling\.resample_rounds draws groups again at once"):
        module(rollout=VLLM(mode="server", max_staleness=1), handling=Handling(resample_rounds=1))


def test_a_missing_or_untried_vllm_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvr_lightning.rollout.vllm import settings

    monkeypatch.setattr(settings, "_version", lambda package: ())
    with pytest.raises(ValueError, match=r"rollout: vllm is not installed; pip install 'vllm>=0.32,<0.33'"):
        module(rollout="vllm")
    monkeypatch.setattr(settings, "_version", lambda package: (0, 40))
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"rollout: vllm 0.40 is installed, which is untried"):
        module(rollout="vllm")
