"""Engines that draw completions from the policy."""
