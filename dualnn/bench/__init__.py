"""Benchmarks beside their peers in the same run. Empty for now."""
