"""Observers: who is told what happens."""
