"""The real vLLM against the embedded engine; `make test-vllm` runs these, in an environment that has it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_causal_lm
from lightning.pytorch import Trainer

from rlvr_lightning.data.arithmetic import Arithmetic
from rlvr_lightning.data.prompts import PromptData
from rlvr_lightning.evaluation_plan import Evaluation
from rlvr_lightning.experience import Batching
from rlvr_lightning.grpo import GRPO
from rlvr_lightning.optim import SGD
from rlvr_lightning.policy import TINY, LoRA, Policy, load_model, load_tokenizer
from rlvr_lightning.rewards.arithmetic import FinalAnswer
from rlvr_lightning.rollout import stop_token_ids
from rlvr_lightning.rollout.hf import HFEngine
from rlvr_lightning.rollout.vllm.engine import VLLMEngine
from rlvr_lightning.rollout.vllm.requests import engine_options
from rlvr_lightning.rollout.vllm.settings import VLLM
from rlvr_lightning.rollout.vllm.sync import WeightSync
from rlvr_lightning.schema import Rollouts, Sampling

pytestmark = pytest.mark.vllm
CPU = torch.device("cpu")
TOKENIZER = load_tokenizer(str(TINY))
STOPS = stop_token_ids(TOKENIZER)
PROMPTS = [TOKENIZER(record["prompt"]).input_ids for record in Arithmetic(num=15, levels=[1, 3, 5])]
LONG = [[3 + (7 * k + p) % 11 for k in range(70 + p)] for p in range(5)]  # full blocks of the prefix cache


def untied(folder: Path) -> str:
    """Grouped query attention, output layer of its own, the tiny model's vocabulary, random."""
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 128, "intermediate_size": 72, "initializer_range": 0.05}
    tiny_causal_lm("llama", tie_word_embeddings=False, eos_token_id=1, **sizes).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    return str(folder)


class Pair:
    """A policy, and vLLM that follows it, in this process or as a server."""

    def __init__(self, folder: str, settings: VLLM, lr: float, log_file: Path, lora: LoRA | None = None) -> None:
        bare = load_model(folder, torch.bfloat16)
        self.policy = Policy(lora.adapt(bare) if lora else bare)
        self.policy.compute_in(torch.float32)
        self.hf = HFEngine(self.policy.model, STOPS, TOKENIZER.pad_token_id)
        options = engine_options(settings, folder, torch.float32, 128, CPU, lora.rank if lora else 0)

        def start() -> Any:
            if settings.mode == "colocated":
                from rlvr_lightning.rollout.vllm.colocated import Colocated

                return Colocated(options, sleeps=False)
            from rlvr_lightning.rollout.vllm.server import Servers, Started

            return Servers([], lambda: Started(options, log_file, None, 300.0), None, 300.0)

        sync = WeightSync(self.policy, torch.float32)
        self.vllm = VLLMEngine(start, sync, STOPS, TOKENIZER.pad_token_id, settings, 128, CPU)
        self.optimizer = SGD([p for p in self.policy.parameters() if p.requires_grad], lr=lr)
        self.vllm.follow(self.optimizer)
        self.steps = 0

    def step(self) -> None:
        """A step that changes some entries of everything."""
        generator = torch.Generator().manual_seed(self.steps)
        self.steps += 1
        for parameter in (p for p in self.policy.parameters() if p.requires_grad):
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.optimizer.step()


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = str(TINY) if request.param == "tied" else untied(tmp_path_factory.mktemp("untied"))
    made = Pair(folder, VLLM(sync="sparse", check_every=1), 1e-5, Path())
    yield made
    made.vllm.close()


def greedy(tokens: int = 30) -> Sampling:
    return Sampling(max_tokens=tokens, temperature=0.0)


def assert_same(one: Rollouts, other: Rollouts, apart: float = 1e-4) -> None:
    assert torch.equal(one.completion_ids, other.completion_ids)
    assert torch.equal(one.completion_mask, other.completion_mask)
    assert torch.equal(one.truncated, other.truncated)
    assert float((one.rollout_logprobs - other.rollout_logprobs).abs().max()) < apart


def test_greedy_completions_and_logprobs_are_those_of_the_embedded_engine(pair: Pair) -> None:
    for tokens in (30, 3):
        seeds = list(range(len(PROMPTS)))
        one = pair.vllm.generate(PROMPTS, 2, greedy(tokens), seeds)
        other = pair.hf.generate(PROMPTS, 2, greedy(tokens), seeds)
        assert_same(one, other)
        assert tokens != 3 or bool(one.truncated.any())
    nothing = pair.vllm.generate([], 2, greedy(), [])
    assert nothing.completion_ids.shape == (0, 0)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_k": 3}, {"temperature": 0.9, "top_p": 0.8}])
def test_logprobs_are_of_the_distribution_drawn_from(pair: Pair, sampling: dict[str, Any]) -> None:
    settings = Sampling(max_tokens=20, **sampling)
    drawn = pair.vllm.generate(PROMPTS, 3, settings, list(range(len(PROMPTS))))
    for r in range(len(PROMPTS) * 3):
        tokens = drawn.completion_ids[r][drawn.completion_mask[r]].tolist()
        prompt = PROMPTS[r // 3]
        with torch.no_grad():
            logits = (
                pair.policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
            )
        logits = logits / settings.temperature
        if settings.top_k:
            logits[logits < logits.topk(settings.top_k).values[:, -1:]] = -torch.inf
        if settings.top_p < 1:
            ordered, places = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= settings.top_p
            logits[beyond.gather(1, places.argsort(-1))] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found = drawn.rollout_logprobs[r][drawn.completion_mask[r]]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-4)


def test_a_completion_depends_on_its_prompt_and_seed_alone(pair: Pair) -> None:
    settings = Sampling(max_tokens=20)
    together = pair.vllm.generate(PROMPTS, 4, settings, [5] * len(PROMPTS))
    alone = pair.vllm.generate(PROMPTS[7:8], 2, settings, [5])
    width = alone.completion_ids.shape[1]
    assert torch.equal(together.completion_ids[28:30, :width], alone.completion_ids)
    other = pair.vllm.generate(PROMPTS, 4, settings, [6] * len(PROMPTS))
    assert other.completion_ids.shape != together.completion_ids.shape or not torch.equal(
        other.completion_ids, together.completion_ids
    )
    kinds = [len({tuple(row.tolist()) for row in together.completion_ids[4 * p : 4 * p + 4]}) for p in range(15)]
    assert max(kinds) > 1, "a group is not one completion"


def test_sparse_updates_of_twenty_steps_are_exact_to_the_bit(pair: Pair) -> None:
    """Digests are compared after every update (`check_every=1`); the tied and the fused weights are among them."""
    pair.vllm.generate(PROMPTS[:1], 1, greedy(2), [0])
    for number in range(20):
        pair.step()
        one = pair.vllm.generate(LONG, 1, greedy(9), [0] * 5)
        sent, dense = pair.vllm.metrics["rollout/sync_bytes"], pair.vllm.metrics["rollout/sync_dense_bytes"]
        assert pair.vllm.metrics["rollout/sync_sparse"] == 1.0 and 0 < sent < 0.9 * dense
        if number % 5 == 0:  # a cached prefix of older weights would show here
            assert_same(one, pair.hf.generate(LONG, 1, greedy(9), [0] * 5))
    held = pair.vllm.client.digests(pair.vllm.sync.shapes())
    assert held == dict(pair.vllm.sync.digests())


def test_after_an_update_that_was_cut_off_everything_is_sent(pair: Pair) -> None:
    pair.vllm.generate(PROMPTS[:1], 1, greedy(2), [0])
    pair.step()
    parts = pair.vllm.sync.parts

    def cut() -> Iterator[Any]:
        yield next(parts())
        raise ConnectionError("cut off")

    pair.vllm.sync.parts = cut  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="cut off"):
        pair.vllm.generate(PROMPTS, 1, greedy(), list(range(15)))
    pair.vllm.sync.parts = parts  # type: ignore[method-assign]
    one = pair.vllm.generate(PROMPTS, 1, greedy(), list(range(15)))
    assert pair.vllm.metrics["rollout/sync_sparse"] == 0.0
    assert_same(one, pair.hf.generate(PROMPTS, 1, greedy(), list(range(15))))


def test_a_wrong_weight_is_found(pair: Pair) -> None:
    pair.vllm.generate(PROMPTS[:1], 1, greedy(2), [0])
    weight = pair.policy.causal_lm.model.layers[1].self_attn.k_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[2, 3] += 1.0  # behind the optimizer's back
    with pytest.raises(RuntimeError, match=r"1 of \d+ tensors, first model\.layers\.1\.self_attn\.k_proj\.weight"):
        pair.vllm.generate(PROMPTS[:1], 1, greedy(2), [0])
    with torch.no_grad():
        weight.copy_(before)
    pair.vllm.check()


def test_what_does_not_fit_is_said(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"sampling.max_tokens: with the longest prompt \d+ tokens, over 128"):
        pair.vllm.generate(LONG, 1, greedy(100), [0] * 5)


def module(folder: str, rollout: Any, **settings: Any) -> GRPO:
    defaults: dict[str, Any] = {
        "rewards": {"answer": FinalAnswer()},
        "optimizer": lambda parameters: SGD(parameters, lr=0.06),
        "group_size": 4,
        "sampling": Sampling(max_tokens=30),
        "evaluation": Evaluation(samples=0),
        "dtype": "bfloat16",
    }
    return GRPO(folder, rollout=rollout, **defaults | settings)


def fit(model: GRPO, folder: Path, steps: int) -> Trainer:
    data = PromptData(
        str(TINY), train=Arithmetic(num=40), val={"sums": Arithmetic(num=12, split="val")}, prompts_per_step=6
    )
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_steps=steps, accelerator="cpu", devices=1, default_root_dir=str(folder), **quiet)
    trainer.fit(model, datamodule=data)
    return trainer


def test_grpo_learns_from_it_and_says_how_far_it_is_from_the_trainer(tmp_path: Path) -> None:
    model = module(str(TINY), VLLM(sync="sparse"), batching=Batching(minibatches=3))
    assert model.objective.correction == "truncate", "by default"
    trainer = fit(model, tmp_path, steps=6)
    told = trainer.callback_metrics
    assert 0 < told["policy/fresh_rollout_gap_max"] < 1e-3 and told["policy/fresh_rollout_kl"] < 1e-6
    assert told["policy/corrected_frac"] == 0.0 and told["policy/ratio_mean"] == pytest.approx(1.0, abs=0.05)
    assert 0 < told["rollout/sync_bytes"] < told["rollout/sync_dense_bytes"] and told["time/sync_s"] > 0
    embedded = module(str(TINY), "hf")
    fit(embedded, tmp_path, steps=0 + 1)
    assert model.engine._client is None, "ended with the run"


def test_no_room_for_the_kv_cache_is_said_before_training(tmp_path: Path) -> None:
    model = module(str(TINY), VLLM(kv_cache_gib=1e-6))
    with pytest.raises(ValueError, match=r"^rollout: vLLM cannot start: .*; raise rollout.kv_cache_gib or") as caught:
        fit(model, tmp_path, steps=1)
    assert "\n" not in str(caught.value)


def test_validation_is_that_of_the_embedded_engine(tmp_path: Path) -> None:
    found = []
    for rollout in ("vllm", "hf"):
        model = module(str(TINY), rollout)
        data = PromptData(str(TINY), val={"sums": Arithmetic(num=30, split="val")})
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=str(tmp_path / rollout),
        )
        (told,) = trainer.validate(model, datamodule=data, verbose=False)
        found.append(told["val/sums/greedy_pass@1"])
    assert found[0] == found[1] and 0 < found[0] < 1


@pytest.mark.parametrize("mode", ["colocated", "server"])
def test_of_adapters_only_the_adapters_are_sent(mode: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pair = Pair(str(TINY), VLLM(mode=mode), 0.05, tmp_path / "log.txt", LoRA(rank=3))
    seeds = list(range(len(PROMPTS)))
    for number in range(4):
        one = pair.vllm.generate(PROMPTS, 1, greedy(), seeds)
        assert_same(one, pair.hf.generate(PROMPTS, 1, greedy(), seeds), 1e-3)
        sent, dense = pair.vllm.metrics["rollout/sync_bytes"], pair.vllm.metrics["rollout/sync_dense_bytes"]
        adapters = sum(p.nbytes for p in pair.policy.parameters() if p.requires_grad)
        assert sent > dense if number == 0 else adapters <= sent < adapters + 20_000
        pair.step()
    pair.vllm.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(str(TINY), VLLM(mode="server", check_every=1), 1e-5, tmp_path_factory.mktemp("server") / "log.txt")
    yield made
    made.vllm.close()


def test_a_server_is_the_embedded_engine_and_takes_entries(served: Pair) -> None:
    seeds = list(range(len(PROMPTS)))
    for _ in range(4):
        one = served.vllm.generate(PROMPTS, 2, greedy(), seeds)
        assert_same(one, served.hf.generate(PROMPTS, 2, greedy(), seeds))
        served.step()
    assert served.vllm.metrics["rollout/sync_sparse"] == 1.0
    many = served.vllm.generate(PROMPTS, 3, Sampling(max_tokens=20), seeds)
    alone = served.vllm.generate(PROMPTS[4:5], 3, Sampling(max_tokens=20), [4])
    assert torch.equal(many.completion_ids[12:15, : alone.completion_ids.shape[1]], alone.completion_ids)


def test_a_server_that_dies_while_sampling_is_replaced_and_its_prompts_are_sampled_again(served: Pair) -> None:
    import threading

    seeds = list(range(len(PROMPTS)))
    served.vllm.generate(PROMPTS, 1, greedy(), seeds)
    first = served.vllm.client.own.process.pid  # type: ignore[attr-defined]
    sample = served.vllm.client.sample

    def dying(requests: Any, options: Any) -> Any:
        timer = threading.Timer(0.05, lambda: os.killpg(first, signal.SIGKILL))
        timer.start()
        return sample(requests, options)

    served.vllm.client.sample = dying  # type: ignore[method-assign]
    served.step()
    found = {}
    original = served.vllm.client.recover

    def recover() -> None:
        served.vllm.client.sample = sample  # type: ignore[method-assign]
        original()
        found["again"] = True

    served.vllm.client.recover = recover  # type: ignore[method-assign]
    one = served.vllm.generate(PROMPTS * 8, 2, greedy(), seeds * 8)
    assert found == {"again": True}, "it was lost in the middle"
    assert len(one.completion_ids) == len(PROMPTS) * 16
    assert_same(one, served.hf.generate(PROMPTS * 8, 2, greedy(), seeds * 8))
    assert served.vllm.client.own.process.pid != first  # type: ignore[attr-defined]


def test_nothing_of_a_server_outlives_it(served: Pair) -> None:
    served.vllm.generate(PROMPTS[:1], 1, greedy(), [0])
    group = served.vllm.client.own.process.pid  # type: ignore[attr-defined]
    folder = served.vllm.client._folder  # type: ignore[attr-defined]
    served.vllm.close()
    deadline = time.monotonic() + 20
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert members(group) == [] and not folder.exists()


def members(group: int) -> list[int]:
    """Processes of a process group that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    from rlvr_lightning.rollout.vllm.server import Started

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    options = engine_options(VLLM(), str(tmp_path), torch.float32, 128, CPU)
    with pytest.raises(ValueError, match=r"rollout: the vLLM server ended; the end of .*log.txt: .*nonsense"):
        Started(options, tmp_path / "log.txt", None, 200.0)
