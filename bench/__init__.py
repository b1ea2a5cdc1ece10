"""The bench: ratios between sides of one run, on one machine."""
