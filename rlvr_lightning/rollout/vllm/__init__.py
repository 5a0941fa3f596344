"""Rollouts by vLLM, kept on the current policy. Imports vLLM only where one is started."""
