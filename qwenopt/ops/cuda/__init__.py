"""The CUDA C++ kernels (csrc/cuda/kernels) as providers: what each takes, and the grid that it is started on."""
