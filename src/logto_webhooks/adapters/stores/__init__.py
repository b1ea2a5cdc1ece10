"""Stores: what is kept, and how."""
