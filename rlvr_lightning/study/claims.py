"""The papers' claims, one by one, beside what the records in `results/` show.

Each claim has a rule that says, before one looks, what would confirm it here; the verdict follows from the rule and the
records. `python -m rlvr_lightning plots results/CLAIMS.md` fills the page's `<!-- claims -->` block.

A = "Do We Need Adam?" (arXiv 2602.07729), B = "RL Finetunes Small Subnetworks" (arXiv 2505.11711), C = what challenges
them: RL's Razor (2509.04259), The Path Not Taken (2511.08567), LoRA Without Regret (Thinking Machines, 2025), and the
authors' own later paper on Fisher information (2609.36262).
"""

from __future__ import annotations

import re
from pathlib import Path

from rlvr_lightning.study import claims_learning, claims_weights
from rlvr_lightning.study.claim import Claim, Seen
from rlvr_lightning.study.tables import markdown

BLOCK = re.compile(r"(<!-- claims -->\n).*?(<!-- end -->)", re.DOTALL)
CLAIMS = sorted([*claims_learning.CLAIMS, *claims_weights.CLAIMS], key=lambda claim: claim.paper)


def seen_of(claim: Claim, results: Path) -> Seen:
    """What the records show of a claim; that they are missing, if they are."""
    try:
        return claim.look(results)
    except ValueError as error:
        return Seen(str(error).removeprefix("claims: ").replace(f"{results}/", ""), "not run")


def fill_claims(text: str, results: Path) -> str:
    """A Markdown text with its block replaced by the table of claims."""

    def filled(block: re.Match[str]) -> str:
        rows = [["", "claim", "would be confirmed by", "seen here", "verdict"]]
        for claim in CLAIMS:
            seen = seen_of(claim, results)
            rows.append([claim.paper, claim.says, claim.rule, seen.text, f"**{seen.verdict}**"])
        return f"{block[1]}{markdown(rows)}\n{block[2]}"

    return BLOCK.sub(filled, text)
