"""Tests and measurements on a machine with an NVIDIA GPU: `bench/gpu/run.sh`."""
