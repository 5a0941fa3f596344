"""Programs of unknown intent, run with nothing to reach and little to take."""

from rlvr_lightning.rewards.sandbox.limits import Limits
from rlvr_lightning.rewards.sandbox.sandbox import Calls, Case, Sandbox, Verdict

__all__ = ["Calls", "Case", "Limits", "Sandbox", "Verdict"]
