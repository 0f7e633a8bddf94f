"""The parts of the benchmark scripts that would spoil their numbers without a sound (`benchmarks/`)."""
