"""Processes, signals, and what the docs walk through."""
