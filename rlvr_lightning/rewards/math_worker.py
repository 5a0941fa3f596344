"""The process in which math-verify runs: mathematics from a language model can loop for ever or eat all memory.

Run as a file, not imported: it starts in about a second because it loads neither torch nor this package. It prints
"ready", then answers each JSON line (`[number, "same", gold, answer]` or `[number, "parses", text]`) with the number
and `true` or `false`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

MEMORY_BYTES = 2 << 30


def main() -> None:
    """Serve standard input until it ends."""
    from math_verify import parse, verify

    def parsed(text: str) -> list[object]:
        # No time limit inside: theirs is a signal, ours is the reader of this process, who kills it.
        return parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=None)

    def parses(text: str) -> bool:
        return bool(parsed(text))

    def same(gold: str, answer: str) -> bool:
        left, right = parsed(gold), parsed(answer)
        return bool(left) and bool(right) and bool(verify(left, right, timeout_seconds=None))

    verbs: dict[str, Callable[..., bool]] = {"parses": parses, "same": same}
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not be taken for an answer
    limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        number, verb, *texts = json.loads(line)
        try:
            verdict = verbs[verb](*texts)
        except Exception:  # sympy raises nearly anything; what cannot be compared is not shown to be right
            verdict = False
        print(f"{number} {json.dumps(verdict)}", file=answers, flush=True)


def limit_memory() -> None:
    """Cap this process's address space, where the system can."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    main()
