"""Triton kernels, installed as `qwenopt.triton_kernels`: torch, triton and numpy in, nothing of qwenopt."""

if __name__ != "qwenopt.triton_kernels":
    raise ImportError("import qwenopt.triton_kernels, not triton_kernels: a second copy would compile everything twice")
