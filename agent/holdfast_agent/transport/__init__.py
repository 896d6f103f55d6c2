"""Frames between two workers over TCP."""
