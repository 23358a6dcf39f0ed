"""One file a family: bench_<family>.py."""
