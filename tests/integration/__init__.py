"""Databases, and applications in this process."""
