"""Memory and speed: predicted, measured, recorded."""
