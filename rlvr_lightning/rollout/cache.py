"""Keys and values of the sequences in flight: every prompt once, however many completions continue it.

Attention of a new token has two parts, the prompt and the completion's own earlier tokens, under one softmax. For the
first part the completions of a prompt form one matrix of queries. Prompts of similar length are stacked into a bucket;
a prompt of very different length gets another bucket instead of padding.

Own tokens are written by all sequences into the same column, so that a step writes one slice and copies nothing.
A sequence that joined later starts at a later column; what lies before is masked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rlvr_lightning.rollout.attention import scores

COLUMNS = 64  # own tokens that room is made for at a time
LayerKV = dict[int, tuple[Tensor, Tensor]]


@dataclass
class Bucket:
    """Prompts of similar length, stacked."""

    prompts: list[int]
    lengths: list[int]
    layers: LayerKV = field(default_factory=dict)
    """Keys and values [prompts * heads, S, D] of each layer."""

    def bias(self, heads: int, like: Tensor) -> Tensor | None:
        """[prompts * heads, 1, S]: -inf on padding; None where there is none."""
        width = max(self.lengths)
        if min(self.lengths) == width:
            return None
        padding = torch.arange(width) >= torch.tensor(self.lengths)[:, None]
        bias = torch.zeros(padding.shape).masked_fill_(padding, -torch.inf)
        return bias.repeat_interleave(heads, 0)[:, None].to(like)


@dataclass(frozen=True)
class Layout:
    """How rows of queries are regrouped by prompt and back, for a number of key heads."""

    gather: Tensor
    """int64 [slots]: which (row, head) fills a slot; slots run over bucket, prompt, head, place in the group."""
    scatter: Tensor
    """int64 [rows * heads]: the slot of each (row, head)."""
    slots: list[int]
    """How many slots each bucket has."""
    offset: Tensor
    """int64 [rows * heads, 1, 1]: position of a row's token less its column."""
    prefix_bias: list[Tensor | None]
    suffix_bias: Tensor | None
    """[rows * heads, 1, columns]: -inf before a row's first column; None where all rows began together."""


class SharedCache:
    """The cache of a batch of sequences, one row each, during decoding."""

    def __init__(self) -> None:
        self.prompt_of_row: list[int] = []
        self.prompts: dict[int, LayerKV] = {}
        self.buckets: list[Bucket] = []
        self.suffix: LayerKV = {}
        self.capacity = 0  # columns there is room for
        self.column = 0  # columns written
        self.starts: list[int] = []  # first column of each row
        self._layouts: dict[int, Layout] = {}

    def add(self, prompts: dict[int, LayerKV], prompt_of_row: list[int], waiting: set[int]) -> None:
        """Let sequences join.

        Args:
            prompts: number -> keys and values [heads, S, D] by layer, of prompts that are not in the cache yet.
            prompt_of_row: the prompt of each new row.
            waiting: prompts to keep although no row needs them now.
        """
        self.prompts.update(prompts)
        self._resize(len(prompt_of_row))
        self.prompt_of_row += prompt_of_row
        self.starts += [self.column] * len(prompt_of_row)
        self._stack_prompts(waiting)

    def keep(self, alive: list[bool], waiting: set[int]) -> list[int]:
        """Let sequences leave: the last rows move into the places of those that end.

        Args:
            alive: of each row.
            waiting: prompts to keep although no row needs them now.

        Returns:
            For each row that is left, the row it was before.
        """
        left = sum(alive)
        holes = [i for i in range(left) if not alive[i]]
        movers = [i for i in range(left, len(alive)) if alive[i]]
        order = list(range(left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for tensors in self.suffix.values() if holes else ():
            for x in tensors:
                x[holes, :, : self.column] = x[movers, :, : self.column]
        self.prompt_of_row = [self.prompt_of_row[i] for i in order]
        self.starts = [self.starts[i] for i in order]
        self._layouts.clear()
        live = set(self.prompt_of_row)
        self.buckets = [b for b in self.buckets if not live.isdisjoint(b.prompts)]
        if 2 * len(live) < sum(len(b.prompts) for b in self.buckets):
            self._stack_prompts(waiting)
        return order

    def open_column(self) -> None:
        """Make room for one more own token of every row; the next forward pass writes it."""
        if self.column >= self.capacity:
            self._resize(0)
        self.column += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """Attention of one new token a row: see `AttentionState`."""
        rows, heads, _, depth = key.shape
        own_key, own_value = self._write(layer, key, value)
        layout = self._layouts.get(heads) or self._lay_out(heads, key)
        queries = query.reshape(rows * heads, -1, depth)
        width = max(max(b.lengths) for b in self.buckets)
        bias = layout.suffix_bias
        all_scores = torch.cat(
            [
                self._prompt_scores(layer, queries, layout, width, scale),
                scores(queries, own_key, None if bias is None else bias[:, :, : self.column], scale),
            ],
            dim=-1,
        )
        if window is not None:
            last = self.column - 1
            distance = layout.offset + last - torch.arange(width, device=key.device)
            all_scores[:, :, :width].masked_fill_(distance >= window, -torch.inf)
            all_scores[:, :, width : width + max(0, self.column - window)] = -torch.inf
        shares = all_scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        output = self._prompt_values(layer, shares[:, :, :width], layout)
        return torch.baddbmm(output, shares[:, :, width:], own_value).view(rows, 1, query.shape[1], -1)

    def _prompt_scores(self, layer: int, queries: Tensor, layout: Layout, width: int, scale: float) -> Tensor:
        """[rows * heads, M, width] scores of each row's queries [rows * heads, M, D] and its prompt's keys."""
        by_slot = queries.flatten(1).index_select(0, layout.gather).split(layout.slots)
        parts = []
        for bucket, part, bias in zip(self.buckets, by_slot, layout.prefix_bias, strict=True):
            keys = bucket.layers[layer][0]
            found = scores(part.view(len(keys), -1, queries.shape[2]), keys, bias, scale)
            missing = width - keys.shape[1]
            found = nn.functional.pad(found, (0, missing), value=-torch.inf) if missing else found
            parts.append(found.view(len(part), -1))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined.index_select(0, layout.scatter).view(len(queries), -1, width)

    def _prompt_values(self, layer: int, shares: Tensor, layout: Layout) -> Tensor:
        """[rows * heads, M, D] sums of the values of each row's prompt, by their shares [rows * heads, M, width]."""
        rows, queries, width = shares.shape
        by_slot = shares.reshape(rows, -1).index_select(0, layout.gather).split(layout.slots)
        parts = []
        for bucket, part in zip(self.buckets, by_slot, strict=True):
            values = bucket.layers[layer][1]
            weights = part.view(len(values), -1, width)[:, :, : values.shape[1]]
            parts.append(torch.bmm(weights, values).view(len(part), -1))
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined.index_select(0, layout.scatter).view(rows, queries, -1)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values into the open column; all of the rows' own, [rows * heads, columns, D]."""
        rows, heads = key.shape[:2]
        if layer not in self.suffix:
            self.suffix[layer] = tuple(x.new_zeros(rows, heads, self.capacity, x.shape[-1]) for x in (key, value))  # type: ignore[assignment]
        own = []
        for buffer, new in zip(self.suffix[layer], (key, value), strict=True):
            buffer[:rows, :, self.column - 1] = new[:, :, 0]
            own.append(buffer.view(-1, self.capacity, buffer.shape[-1])[: rows * heads, : self.column])
        return own[0], own[1]

    def _resize(self, joining: int) -> None:
        """Buffers for the rows there are and those that join, without the columns that no row needs any more."""
        rows = len(self.starts)
        first = min(self.starts, default=self.column)
        used = self.column - first
        self.capacity = used + COLUMNS
        for layer, tensors in self.suffix.items():
            grown = []
            for x in tensors:
                new = x.new_empty(rows + joining, x.shape[1], self.capacity, x.shape[-1])
                new[:rows, :, :used] = x[:rows, :, first : self.column]
                new[rows:, :, :used] = 0  # masked, but a NaN found there would still spread
                grown.append(new)
            self.suffix[layer] = (grown[0], grown[1])
        self.starts = [s - first for s in self.starts]
        self.column = used
        self._layouts.clear()

    def _stack_prompts(self, waiting: set[int]) -> None:
        """Sort the prompts in use into buckets; forget the others."""
        live = set(self.prompt_of_row)
        self.prompts = {p: kv for p, kv in self.prompts.items() if p in live or p in waiting}
        lengths = {p: next(iter(self.prompts[p].values()))[0].shape[1] for p in live}
        self.buckets = []
        for p in sorted(live, key=lambda p: (lengths[p], p)):
            if not self.buckets or lengths[p] > 1.5 * self.buckets[-1].lengths[0] + 16:
                self.buckets.append(Bucket(prompts=[], lengths=[]))
            self.buckets[-1].prompts.append(p)
            self.buckets[-1].lengths.append(lengths[p])
        for bucket in self.buckets:
            for layer in self.prompts[bucket.prompts[0]]:
                keys = _stack([self.prompts[p][layer][0] for p in bucket.prompts], bucket.lengths)
                values = _stack([self.prompts[p][layer][1] for p in bucket.prompts], bucket.lengths)
                bucket.layers[layer] = (keys.flatten(0, 1), values.flatten(0, 1))
                # From now on the stack is the only copy.
                for i, (p, length) in enumerate(zip(bucket.prompts, bucket.lengths, strict=True)):
                    self.prompts[p][layer] = (keys[i, :, :length], values[i, :, :length])
        self._layouts.clear()

    def _lay_out(self, heads: int, like: Tensor) -> Layout:
        """The regrouping for the rows there are now."""
        group = Counter(self.prompt_of_row)
        places = [max((group[p] for p in b.prompts), default=0) for b in self.buckets]
        first: dict[int, int] = {}  # slot of a prompt's first row and head
        slots = 0
        for bucket, width in zip(self.buckets, places, strict=True):
            for p in bucket.prompts:
                first[p] = slots
                slots += heads * width
        width_of = {p: width for b, width in zip(self.buckets, places, strict=True) for p in b.prompts}
        gather = [0] * slots  # slots without a row compute row 0 again; nobody reads them
        scatter = []
        seen: Counter[int] = Counter()
        for row, p in enumerate(self.prompt_of_row):
            for head in range(heads):
                slot = first[p] + head * width_of[p] + seen[p]
                gather[slot] = row * heads + head
                scatter.append(slot)
            seen[p] += 1
        lengths = {p: n for b in self.buckets for p, n in zip(b.prompts, b.lengths, strict=True)}
        offset = torch.tensor([lengths[p] - s for p, s in zip(self.prompt_of_row, self.starts, strict=True)])
        sizes = [len(b.prompts) * heads * width for b, width in zip(self.buckets, places, strict=True)]
        layout = Layout(
            gather=torch.tensor(gather, device=like.device),
            scatter=torch.tensor(scatter, device=like.device),
            slots=sizes,
            offset=offset.repeat_interleave(heads)[:, None, None].to(like.device),
            prefix_bias=[b.bias(heads, like) for b in self.buckets],
            suffix_bias=self._suffix_bias(heads, like),
        )
        self._layouts[heads] = layout
        return layout

    def _suffix_bias(self, heads: int, like: Tensor) -> Tensor | None:
        if not any(self.starts):
            return None
        before = torch.arange(self.capacity) < torch.tensor(self.starts)[:, None]
        bias = torch.zeros(before.shape).masked_fill_(before, -torch.inf)
        return bias.repeat_interleave(heads, 0)[:, None].to(like)


def _stack(tensors: list[Tensor], lengths: list[int]) -> Tensor:
    """[prompts, heads, S, D] from [heads, length, D] each; zeros behind the shorter ones."""
    heads, _, depth = tensors[0].shape
    stacked = tensors[0].new_zeros(len(tensors), heads, max(lengths), depth)
    for i, x in enumerate(tensors):
        stacked[i, :, : lengths[i]] = x
    return stacked
