"""Realistic payloads of every event, and recorded histories of a real Logto."""
