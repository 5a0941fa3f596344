"""Verifiable rewards: what a completion earned, worked out by a program."""

from rlvr_lightning.rewards.base import Reward

__all__ = ["Reward"]
