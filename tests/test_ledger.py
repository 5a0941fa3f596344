"""The ledger: sums by owner, and the peak as a maximum over instants."""

from __future__ import annotations

import pytest

from rlvr_lightning.profiling.ledger import Held, Instant, Ledger


def test_the_peak_is_of_an_instant() -> None:
    sampling = Instant(name="sampling", phase="rollout", held=Held(weights=7, kv_cache=5))
    backward = Instant(name="backward", phase="training", held=Held(weights=7, gradients=3, activations=4))
    ledger = Ledger(iter([sampling, backward]))
    assert (ledger.peak, ledger.peak_bytes) == (backward, 14)  # 7 + 3 + 4; all owners ever: 7 + 5 + 3 + 4
    assert (ledger.phase_bytes("rollout"), ledger.phase_bytes("training")) == (12, 14)
    assert backward.held.owners() == {"weights": 7, "gradients": 3, "activations": 4}
    assert Ledger([sampling]).phase_bytes("training") == 0
    with pytest.raises(ValueError, match="at least one instant"):
        Ledger([])
