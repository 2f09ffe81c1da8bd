"""How fast holdfast is, beside its rivals and the machine's limits: ``python -m benchmarks``."""
