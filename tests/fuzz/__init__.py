"""Random residual programs, checked for their sites and against the oracle: `python -m tests.fuzz --programs 2000`."""
