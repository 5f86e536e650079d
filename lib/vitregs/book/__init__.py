"""Chapters as programs."""
