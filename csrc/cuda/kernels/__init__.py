"""CUDA kernel sources, installed as `qwenopt.cuda_src` so that they can be compiled at run time."""
