"""Measured claims: each module prints JSON; none is a test. The figures are in RESULTS.md."""
