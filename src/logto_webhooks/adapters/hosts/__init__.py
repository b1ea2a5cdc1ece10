"""Hosts: where the steps of a store run."""
