"""Clusters on one machine: emulated networks for tests and benchmarks. Needs nothing but Python and iproute2."""
