"""The commands, the benchmarks, and the repository itself: package, docs, workflows."""
