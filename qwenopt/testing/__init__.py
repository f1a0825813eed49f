"""Shared by tests and benches: model builders, tolerances, op cases, decoding loops. Importing this imports nothing heavy."""
