"""Receive deliveries: verify, store durably, answer."""
