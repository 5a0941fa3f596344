"""What runs in the sandbox: standard library only, and no import of the rest of this package."""
