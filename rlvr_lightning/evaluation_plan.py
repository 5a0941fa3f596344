"""What is measured of a problem, and how: the block `evaluation:` of a module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rlvr_lightning.metrics import MajorityAtK, MeanLength, PassAtK, ProblemMean, TruncatedShare, over
from rlvr_lightning.ranks import Ranks
from rlvr_lightning.schema import Sampling


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the problems of a benchmark are measured."""

    samples: int = 4
    """Sampled completions per problem, beside the greedy one; 0: greedy only."""
    k: list[int] = field(default_factory=list)
    """Numbers of samples for pass@k and maj@k; by default all of them. pass@1 is always given."""
    sampling: Sampling | None = None
    """How completions are sampled; null: as in training, at temperature 1. The greedy one shares its limits."""
    completions: bool = False
    """Keep the texts as well in the file of problems that `validate` and `test` write."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"evaluation.samples must be 0 (greedy only) or more, got {self.samples}")
        if self.sampling is not None and self.sampling.temperature == 0:
            raise ValueError("evaluation.sampling.temperature must be positive; the greedy completion comes beside")
        for k in self.k:
            if k < 1:
                raise ValueError(f"evaluation.k holds numbers of samples, at least 1, got {k}")
            if k > self.samples:
                raise ValueError(f"evaluation.k: pass@{k} needs {k} samples, but evaluation.samples is {self.samples}")

    @property
    def several(self) -> list[int]:
        """The k above 1."""
        wanted = self.k or [self.samples]
        return sorted({k for k in wanted if k > 1})

    def modes(self, training: Sampling) -> dict[str, tuple[Sampling, int]]:
        """Greedy and sampled: how completions are drawn, and how many."""
        how = self.sampling or replace(training, temperature=1.0)
        modes = {"greedy": (replace(how, temperature=0.0), 1)}
        return modes | ({"sampled": (how, self.samples)} if self.samples else {})

    def measures(self, ranks: Ranks, votes: bool) -> dict[str, tuple[str, ProblemMean]]:
        """By name, the mode of which something is measured, and the metric; new ones."""
        shared, sampled = over(ranks), "sampled" if self.samples else "greedy"
        found: dict[str, tuple[str, ProblemMean]] = {"greedy_pass@1": ("greedy", PassAtK(1, **shared))}
        if self.samples:
            found["pass@1"] = (sampled, PassAtK(1, **shared))
            found |= {f"pass@{k}": (sampled, PassAtK(k, **shared)) for k in self.several}
            found |= {f"maj@{k}": (sampled, MajorityAtK(k, **shared)) for k in self.several if votes}
        found["length_mean"] = (sampled, MeanLength(**shared))
        found["truncated_frac"] = (sampled, TruncatedShare(**shared))
        return found
