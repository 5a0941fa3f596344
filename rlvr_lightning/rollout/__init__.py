"""Engines that draw completions from the policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlvr_lightning.rollout.hf import HFEngine

__all__ = ["HFEngine", "stop_token_ids"]


def __getattr__(name: str) -> Any:
    """Import the engine when it is first asked for: it needs torch, `stop_token_ids` does not."""
    if name == "HFEngine":
        from rlvr_lightning.rollout.hf import HFEngine

        return HFEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> list[int]:
    r"""Tokens that end a completion: end-of-sequence, and every token whose text contains a stop string.

    Args:
        tokenizer: of the policy; it has an end-of-sequence token.
        stop: strings such as "\n". A string is found only inside one token, not where several tokens make it up.

    Returns:
        Ascending token ids.

    Raises:
        ValueError: a stop string is empty, or no token contains it, so that it could never stop anything.
    """
    ids = {int(tokenizer.eos_token_id)}
    if not stop:
        return sorted(ids)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    for string in stop:
        found = [i for i, text in enumerate(texts) if string in text]
        if not string or not found:
            raise ValueError(f"stop: no single token contains {string!r}; give strings that lie within one token")
        ids.update(found)
    return sorted(ids)
