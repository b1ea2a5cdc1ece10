"""Pure: no I/O, no clock, no environment, no randomness, no threads."""
