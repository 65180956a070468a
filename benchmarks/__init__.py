"""What to open to choose a fusion and a recomputation: `python -m benchmarks all`, or any part by its name."""
