"""Hostile input for every reader: `python -m tests.torture` makes it, and says what became of it (SECURITY.md)."""
