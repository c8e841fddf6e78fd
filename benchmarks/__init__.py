"""Benchmarks of torchweld against stock PyTorch; run ``python -m benchmarks --help``."""
