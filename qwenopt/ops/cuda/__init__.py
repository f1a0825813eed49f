"""The CUDA C++ kernels (csrc/cuda/kernels) as providers: what each takes, and the grid that it is started on."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)
