"""CUDA sources compiled at run time: found, compiled by NVRTC, kept on disk, started through CuPy."""
