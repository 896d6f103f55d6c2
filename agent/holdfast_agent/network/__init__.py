"""Taps, plugs inside QEMU, and the signal that output waits."""
