"""Callbacks that observe a Lightning run; each works in any Lightning project."""
