"""Telemetry events, and how they become log lines and metrics."""
