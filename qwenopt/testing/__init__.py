"""Shared by tests and benches: models, tolerances, op cases, decoding loops. Importing this imports nothing heavy."""
