"""Logto's Management API."""
