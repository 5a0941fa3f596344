import json
import random
from collections import Counter

import pytest
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rlvr_lightning.data.arithmetic import Arithmetic, ArithmeticDemos, changes, demonstrate, split_of, totals
from rlvr_lightning.data.prompts import JsonlPrompts, PromptData, PromptLoader, PromptSource, encode


class Records(PromptSource):
    """Given records."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]


def numbered(num):
    return Records([{"prompt": "1" * (i + 1), "answer": i} for i in range(num)])


def make(**kwargs):
    return PromptData("tiny", **{"train": numbered(7), "val": {"ones": numbered(5)}, "prompts_per_step": 3} | kwargs)


# --- Arithmetic ---


def test_answers_are_those_of_python():
    for record in Arithmetic(levels=[1, 3, 5], num=60, seed=3):
        assert eval(record["prompt"].rstrip("=")) == record["answer"]  # the prompt is ours
        assert len(changes(record["prompt"])) == record["level"]
        assert all(0 <= total <= 99 for total in totals(record["prompt"]))


def test_levels_take_turns_and_problems_are_distinct():
    source = Arithmetic(levels=[2, 5, 3], num=103, seed=1)
    assert [record["level"] for record in source][:6] == [2, 5, 3, 2, 5, 3]
    assert Counter(record["level"] for record in source) == {2: 35, 5: 34, 3: 34}
    assert len({record["prompt"] for record in source}) == len(source) == 103


def test_splits_share_no_problem_and_cover_all():
    names = ("train", "val", "test")
    splits = {split: {r["prompt"] for r in Arithmetic(200, split=split, levels=[1, 2])} for split in names}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))
    assert all(split_of(prompt) == split for split, prompts in splits.items() for prompt in prompts)
    counts = Counter(split_of(f"{a}+{b}-{c}=") for a in range(10, 90) for b in range(1, 10) for c in range(1, 10))
    shares = {split: count / counts.total() for split, count in counts.items()}
    assert shares == pytest.approx({"train": 0.8, "val": 0.1, "test": 0.1}, abs=0.02)


def test_demonstrations_are_of_training_problems_only():
    assert {split_of(record["prompt"]) for record in ArithmeticDemos(500)} == {"train"}


def test_sources_depend_on_the_seed_alone():
    assert list(Arithmetic(50, seed=5)) == list(Arithmetic(50, seed=5))
    assert list(Arithmetic(50, seed=5)) != list(Arithmetic(50, seed=6))
    assert list(ArithmeticDemos(50, seed=5)) == list(ArithmeticDemos(50, seed=5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"levels": [], "num": 3}, "levels must be distinct"),
        ({"levels": [6], "num": 3}, "levels must be distinct numbers from 1 to 5"),
        ({"levels": [2, 2], "num": 3}, "levels must be distinct"),
        ({"levels": [1], "num": 0}, "num must be at least 1"),
        ({"levels": [1], "num": 5000, "split": "val"}, "num is too large: level 1 has about"),
    ],
)
def test_impossible_problems_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Arithmetic(**kwargs)


def test_demonstrations_err_as_often_as_asked():
    """The 4/5 who are impatient stop with 2 operations left at 1/2, else with 1 left at 1/4."""
    demos = ArithmeticDemos(4000, levels=[3], slip=0.0, patient=0.2, impatience=[0.25, 0.5])
    steps = Counter(record["demonstration"].count("=") for record in demos)
    assert {k: n / 4000 for k, n in steps.items()} == pytest.approx({1: 0.4, 2: 0.1, 3: 0.3 + 0.2}, abs=0.03)
    slips = ArithmeticDemos(4000, levels=[1], slip=0.2)
    wrong = sum(not record["demonstration"].endswith(f" {record['answer']}") for record in slips)
    assert wrong / 4000 == pytest.approx(0.2, abs=0.03)


def test_a_slip_is_carried_on():
    text = demonstrate("50+8+1=", slip=1.0, impatience=[0.0], rng=random.Random(0))
    first, second, answer = (int(part.split("=")[-1]) for part in text.replace(" answer ", " =").split(" "))
    assert first in (48, 57, 59, 68) and second in (first - 9, first, first + 2, first + 11) and answer == second


# --- JsonlPrompts ---


def test_jsonl_reads_records_and_renames_the_prompt(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "1+1", "answer": 2}\r\n\n{"answer": 3, "question": "1+2"}')
    assert list(JsonlPrompts(str(path), "question")) == [{"prompt": "1+1", "answer": 2}, {"prompt": "1+2", "answer": 3}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"data.jsonl:2: .*Expecting"),
        ('["prompt"]', r"data.jsonl:2: not a JSON object"),
        ('{"text": "a"}', r"data.jsonl:2: no 'prompt'"),
        ('{"prompt": "a", "prompt": "b"}', r"data.jsonl:2: key 'prompt' appears twice"),
        ("[" * 100_000, r"data.jsonl:2: "),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        JsonlPrompts(str(path))


def test_jsonl_other_errors(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "question": "b"}\n')
    with pytest.raises(ValueError, match=r"both 'question' and 'prompt'"):
        JsonlPrompts(str(path), "question")
    with pytest.raises(ValueError, match="no file"):
        JsonlPrompts(str(tmp_path / "none.jsonl"))
    path.write_bytes(b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2: .*decode"):
        JsonlPrompts(str(path))


# --- PromptLoader ---


def indices(batches):
    return [[record["index"] for record in batch] for batch in batches]


def loader(num=11, batch=3, seed=0):
    return PromptLoader([{"index": i} for i in range(num)], batch, seed)


def test_epochs_are_seeded_permutations_with_the_rest_dropped():
    one = loader()
    epochs = [indices(one), indices(one)]
    for epoch in epochs:
        flat = [index for batch in epoch for index in batch]
        assert list(map(len, epoch)) == [3, 3, 3] and len(set(flat)) == 9
    assert epochs[0] != epochs[1]
    assert epochs == [indices(again := loader()), indices(again)]
    assert epochs[0] != indices(loader(seed=1))


@pytest.mark.parametrize("served", range(8))
def test_resume_continues_the_sequence_from_any_position(served):
    def stream(source):
        while True:
            yield from source

    whole = loader()
    batches = stream(whole)
    for _ in range(served):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    rest = stream(resumed)
    assert indices(next(rest) for _ in range(7)) == indices(next(batches) for _ in range(7))


def test_resume_on_other_data_is_refused():
    with pytest.raises(ValueError, match=r"taken with 11 prompts in batches of 3, now there are 10 in batches of 3"):
        loader(num=10).load_state_dict(loader(num=11).state_dict())


class Recorder(LightningModule):
    """Notes which prompts it is given."""

    def __init__(self):
        super().__init__()
        import torch

        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([record["index"] for record in batch])
        return self.weight.sum()

    def configure_optimizers(self):
        import torch

        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])  # 2 batches an epoch: inside and at the end of one
def test_a_resumed_fit_sees_what_an_uninterrupted_one_sees(tmp_path, stop):
    def fit(steps, ckpt=None):
        module = Recorder()
        keep = ModelCheckpoint(tmp_path / str(steps), every_n_train_steps=1, save_top_k=-1, filename="{step}")
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        Trainer(max_steps=steps, callbacks=[keep], **quiet).fit(module, make(val=None), ckpt_path=ckpt)
        return module.seen

    whole = fit(7)
    assert len(whole) == 7
    first = fit(stop)
    assert first + fit(7, tmp_path / str(stop) / f"step={stop}.ckpt") == whole


# --- PromptData ---


def test_batches_hold_ids_index_and_benchmark():
    data = make()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert list(map(len, batches)) == [3, 3]
    record = batches[0][0]
    assert set(record) == {"prompt", "answer", "prompt_ids", "index"}
    assert len(record["prompt_ids"]) == record["index"] + 1 == record["answer"] + 1
    [val] = list(data.val_dataloader())
    assert [(r["index"], r["benchmark"]) for r in val] == [(i, "ones") for i in range(5)]


def test_several_benchmarks_follow_each_other_and_stages_are_apart():
    data = make(val={"a": numbered(4), "b": numbered(3)}, test={"c": numbered(2)}, val_batch=3)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [[r["benchmark"] for r in batch] for batch in batches] == [["a"] * 3, ["a", "b", "b"], ["b"]]
    data.setup("test")
    assert [r["benchmark"] for batch in data.test_dataloader() for r in batch] == ["c", "c"]


def test_long_prompts_are_dropped_counted_and_reported():
    data = make(max_prompt_tokens=5)
    with pytest.warns(UserWarning, match=r"data\.train: dropped 2 of 7 prompts.*data\.max_prompt_tokens=5"):
        data.setup("fit")
    assert sorted(r["index"] for r in data.train_dataloader().records) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("kwargs", "stage", "message"),
    [
        ({"train": Records([])}, "fit", r"data\.train is empty"),
        ({"train": None}, "fit", r"data\.train is missing"),
        ({"train": numbered(2)}, "fit", r"data\.train has 2 prompts, fewer than data\.prompts_per_step=3"),
        ({"val": {"x": Records([])}}, "validate", r"data\.val\.x is empty"),
        ({"val": {"x": Records([{"prompt": "111"}])}, "max_prompt_tokens": 2}, "validate", r"all 1 prompts exceed"),
        ({"val": {"x": Records([{"text": "1"}])}}, "validate", r"data\.val\.x\[0\] has no text under 'prompt'"),
        ({"val": {"x": Records([{"prompt": 7}])}}, "validate", r"has no text under 'prompt'"),
        ({"val": {"x": Records([{"prompt": "1", "index": 1}])}}, "validate", r"has the key 'index'"),
    ],
)
def test_bad_data_is_refused_by_name(kwargs, stage, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs).setup(stage)


def test_bad_counts_are_refused_at_once():
    with pytest.raises(ValueError, match=r"data\.prompts_per_step must be at least 1"):
        make(prompts_per_step=0)
    with pytest.raises(ValueError, match=r"data\.test is missing"):
        make().test_dataloader()


@pytest.mark.parametrize(("adds_bos", "expected"), [(True, [1, 120]), (False, [1, 120])])
def test_a_template_s_first_token_is_neither_doubled_nor_lost(adds_bos: bool, expected: list[int]) -> None:
    class Tokenizer:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text):
            texts = [text] if isinstance(text, str) else text
            ids = [[1] * adds_bos + [1] * t.startswith("<s>") + [ord(c) for c in t.removeprefix("<s>")] for t in texts]
            return {"input_ids": ids[0] if isinstance(text, str) else ids}

    [record] = encode([{"prompt": "<s>x"}], Tokenizer(), 9, "data.train")
    assert record["prompt_ids"] == expected
