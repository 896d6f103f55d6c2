"""The checkpoint loop: drives the cores over ports, imports no adapter."""
