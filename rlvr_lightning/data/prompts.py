"""Prompt sources and the data module that serves them, in an order that a resumed run continues exactly."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from rlvr_lightning.data.cleaning import Cleaning
from rlvr_lightning.data.curriculum import Curriculum, RunningRates
from rlvr_lightning.data.tables import check_ids, read_text_table

Record = dict[str, Any]
RESERVED = ("prompt_ids", "index", "benchmark")


class PromptSource(Sequence[Mapping[str, Any]]):
    """Records with a "prompt" (str) and whatever the reward needs: "answer", "task", "level".

    A subclass implements `__len__` and `__getitem__`. It must hold the same records in the same order on every rank
    and every time it is made with the same arguments.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: Any) -> Any: ...


class ListedPrompts(PromptSource):
    """Records in a list."""

    def __init__(self, records: list[Record]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return self._records[index]


class JsonlPrompts(ListedPrompts):
    """Prompts from a file with one JSON object a line, whole and as they are; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        prompt_field: key of the prompt in the file; it is renamed to "prompt".

    Raises:
        ValueError: the file is missing or empty, or a line is not an object with a prompt, or has the `id` of another;
            names the file and line.
    """

    def __init__(self, path: str, prompt_field: str = "prompt") -> None:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"path: there is no file {path!r}")
        table = read_text_table(file)
        if not table.rows:
            raise ValueError(f"path: {path!r} is empty: it has no rows")
        check_ids(table, list(enumerate(table.rows)))
        lines = table.lines or range(len(table.rows))
        super().__init__(
            [with_prompt(row, prompt_field, f"{file}:{line}") for line, row in zip(lines, table.rows, strict=True)]
        )


def with_prompt(row: Record, prompt_field: str, where: str) -> Record:
    """A row with its prompt under "prompt"; `where` (file:line) opens the message of the ValueError it may raise."""
    if prompt_field not in row:
        raise ValueError(f"{where}: no {prompt_field!r}; each line must be a JSON object with one (see prompt_field)")
    if prompt_field != "prompt" and "prompt" in row:
        raise ValueError(f"{where}: both {prompt_field!r} and 'prompt'; remove or rename one of them")
    return {"prompt": row[prompt_field]} | {key: value for key, value in row.items() if key != prompt_field}


class PromptLoader:
    """Batches of records, in order or in a new seeded permutation every epoch.

    It has a length (Lightning reads loaders without one a batch ahead), uses no workers, and its state is the same on
    all ranks, because Lightning saves rank 0's only. An incomplete last batch is served when in order and dropped when
    shuffled: its prompts are not lost, the next permutation places them elsewhere.

    Args:
        records: what to serve.
        batch: records in a batch.
        seed: of the permutations; None serves the records in order.
        curriculum: which problems an epoch serves, by their running pass rates; None serves all.

    Example:
        >>> loader = PromptLoader([{"index": i} for i in range(7)], batch=3, seed=None)
        >>> [[record["index"] for record in batch] for batch in loader]
        [[0, 1, 2], [3, 4, 5], [6]]
    """

    def __init__(
        self, records: Sequence[Record], batch: int, seed: int | None, curriculum: Curriculum | None = None
    ) -> None:
        self.records = records
        self.batch = batch
        self.seed = seed
        self._epoch = 0
        self._served = 0  # batches of this epoch
        start = [record.get("pass_rate") for record in records]  # measured before the run, see `Cleaning`
        self.rates = RunningRates(curriculum, start) if curriculum else None

    def __len__(self) -> int:
        full, rest = divmod(len(self.records), self.batch)
        return full + (self.seed is None and rest > 0)

    def __iter__(self) -> Iterator[list[Record]]:
        if self._served >= len(self):
            self._epoch, self._served = self._epoch + 1, 0
        if self.rates and self._served == 0:
            self.rates.then = list(self.rates.now)
        order = self.order(self._epoch)
        while self._served < len(self):
            self._served += 1  # before handing out: a checkpoint taken after this batch must not serve it again
            rows = order[(self._served - 1) * self.batch : self._served * self.batch]
            yield [self.records[row] for row in rows]

    def order(self, epoch: int) -> list[int]:
        """Positions of the records, as served in an epoch."""
        order = list(range(len(self.records)))
        if self.seed is not None:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return self.rates.order(order, self.batch, epoch, self.seed or 0) if self.rates else order

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch, and batches served in it; and with a curriculum what it knows of the problems."""
        state = {"epoch": self._epoch, "served": self._served, "records": len(self.records), "batch": self.batch}
        return state | ({"rates": self.rates.state_dict()} if self.rates else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: the data or the batch size changed, so that the position means something else.
        """
        if (state["records"], state["batch"]) != (len(self.records), self.batch):
            raise ValueError(
                f"cannot resume: the checkpoint was taken with {state['records']} prompts in batches of "
                f"{state['batch']}, now there are {len(self.records)} in batches of {self.batch}"
            )
        if ("rates" in state) != bool(self.rates):
            there, here = ("with", "without") if "rates" in state else ("without", "with")
            raise ValueError(
                f"data.curriculum: cannot resume: the checkpoint was taken {there} one, this run is {here}"
            )
        self._epoch, self._served = state["epoch"], state["served"]
        if self.rates:
            self.rates.load_state_dict(state["rates"])


class PromptData(LightningDataModule):
    """Prompts for training, validation and testing.

    A batch is a list of records, each with `prompt_ids` (list[int]) and `index` (int, its place in the source) added,
    in validation and test also `benchmark` (the key it stands under). It is the global batch: the same list on every
    rank, of which the algorithm takes its share. Prompts longer than `max_prompt_tokens` are dropped and reported.

    Args:
        tokenizer: "tiny", "smollm2", a folder or a hub name; that of the model.
        train: what to train on, in a new order every epoch; a last batch that is not full is dropped.
        val: what to validate on, by the name that appears in metrics (`val/<name>/...`).
        test: what to test on, likewise.
        prompts_per_step: prompts in a training batch, over all ranks together.
        val_batch: prompts in a validation or test batch, over all ranks together.
        max_prompt_tokens: longest prompt that is kept.
        seed: of the order of training prompts.
        cleaning: what is taken out of the training problems before anything is learned from them; None: nothing.
        curriculum: set training problems aside while they are always or never solved; None: never.

    Raises:
        ValueError: a count is not positive; or, in `setup`, a source is empty, too small, or holds a bad record.
    """

    def __init__(  # noqa: PLR0913 (the YAML's `data:` block, flat on purpose)
        self,
        tokenizer: str,
        train: PromptSource | None = None,
        val: dict[str, PromptSource] | None = None,
        test: dict[str, PromptSource] | None = None,
        prompts_per_step: int = 16,
        val_batch: int = 64,
        max_prompt_tokens: int = 512,
        seed: int = 0,
        cleaning: Cleaning | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__()
        counts = {"prompts_per_step": prompts_per_step, "val_batch": val_batch, "max_prompt_tokens": max_prompt_tokens}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"data.{name} must be at least 1, got {count}")
        self.tokenizer = tokenizer
        self.train = train
        self.val = val or {}
        self.test = test or {}
        self.prompts_per_step = prompts_per_step
        self.val_batch = val_batch
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.cleaning = cleaning
        self.curriculum = curriculum
        self._loaders: dict[str, PromptLoader] = {}

    def setup(self, stage: str) -> None:
        """Tokenize what the stage ("fit", "validate" or "test") needs, once."""
        from rlvr_lightning.policy import load_tokenizer

        wanted = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(stage, [])
        wanted = [name for name in wanted if name not in self._loaders]
        if wanted:
            tokenizer = load_tokenizer(self.tokenizer)
            self._loaders |= {name: self._loader(name, tokenizer) for name in wanted}

    def _loader(self, stage: str, tokenizer: Any) -> PromptLoader:
        if stage != "train":
            benchmarks = self.val if stage == "val" else self.test
            records = [
                record | {"benchmark": name}
                for name, source in benchmarks.items()
                for record in encode(source, tokenizer, self.max_prompt_tokens, f"data.{stage}.{name}")
            ]
            return PromptLoader(records, self.val_batch, seed=None)
        if self.train is None:
            raise ValueError("data.train is missing: name a source of prompts to fit on")
        records = encode(self.train, tokenizer, self.max_prompt_tokens, "data.train")
        if self.cleaning is not None:
            stages = {"val": self.val, "test": self.test}
            benchmarks = {f"{at}.{name}": source for at, named in stages.items() for name, source in named.items()}
            records = self.cleaning(records, benchmarks)
        if len(records) < self.prompts_per_step:
            raise ValueError(
                f"data.train has {len(records)} prompts, fewer than data.prompts_per_step={self.prompts_per_step}"
            )
        return PromptLoader(records, self.prompts_per_step, self.seed, self.curriculum)

    def observe(self, pass_rates: Mapping[int, float]) -> float:
        """Tell the curriculum how training problems were solved.

        Args:
            pass_rates: share of right completions, by the `index` of the record; the same on all ranks.

        Returns:
            The share of problems that it would serve now.
        """
        loader = self._loaders["train"]
        if loader.rates is None:
            raise ValueError("data.curriculum is not set: there is nothing to tell")
        for row, record in enumerate(loader.records):
            if (rate := pass_rates.get(record["index"])) is not None:
                loader.rates.observe(row, rate)
        return loader.rates.served_frac()

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that any loaded stage serves."""
        loaders = self._loaders.values()
        return max((len(record["prompt_ids"]) for loader in loaders for record in loader.records), default=0)

    def train_dataloader(self) -> PromptLoader:
        """Training batches."""
        return self._loaders["train"]

    def val_dataloader(self) -> PromptLoader | list[Any]:
        """Validation batches, benchmark after benchmark; none if there is no benchmark."""
        return self._loaders["val"] if self.val else []

    def test_dataloader(self) -> PromptLoader | list[Any]:
        """Test batches, benchmark after benchmark."""
        if not self.test:
            raise ValueError("data.test is missing: name at least one source of prompts to test on")
        return self._loaders["test"]


def encode(source: PromptSource, tokenizer: Any, max_prompt_tokens: int, field: str) -> list[Record]:
    """Records of a source with `prompt_ids` and `index`, without those whose prompt is too long.

    Args:
        source: where the records come from.
        tokenizer: of transformers.
        max_prompt_tokens: longest prompt that is kept.
        field: name of the source in messages.

    Raises:
        ValueError: a record has no usable prompt, or none is left.
    """
    records = [check_record(source[index], f"{field}[{index}]") for index in range(len(source))]
    if not records:
        raise ValueError(f"{field} is empty: give it at least one prompt")
    # A chat template may have written the token that the tokenizer puts in front by itself.
    adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token if adds_bos else ""
    ids = tokenizer([record["prompt"].removeprefix(bos) for record in records])["input_ids"]
    encoded = [
        record | {"prompt_ids": list(tokens), "index": index}
        for index, (record, tokens) in enumerate(zip(records, ids, strict=True))
        if len(tokens) <= max_prompt_tokens
    ]
    dropped = len(records) - len(encoded)
    if not encoded:
        raise ValueError(f"{field} is empty: all {dropped} prompts exceed data.max_prompt_tokens={max_prompt_tokens}")
    if dropped:
        rank_zero_warn(
            f"{field}: dropped {dropped} of {len(records)} prompts, longer than data.max_prompt_tokens="
            f"{max_prompt_tokens}"
        )
    return encoded


def check_record(record: Mapping[str, Any], where: str) -> Record:
    """A record as a dict; ValueError unless its prompt is a text and its keys are free."""
    if not isinstance(record.get("prompt"), str) or not record["prompt"]:
        raise ValueError(f"{where} has no text under 'prompt'; its keys are {sorted(map(str, record))}")
    taken = [key for key in RESERVED if key in record]
    if taken:
        raise ValueError(f"{where} has the key {taken[0]!r}, which is added by PromptData: rename it")
    return dict(record)
