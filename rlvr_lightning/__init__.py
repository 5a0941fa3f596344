"""Reinforcement learning with verifiable rewards for language models, at SGD's memory."""

__version__ = "0.1.0"
