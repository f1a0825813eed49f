"""Weights that lie between two multiples of their own size."""

import torch


def test_weights_between_two_floats(kernels, check, isa):
    """float32 two bytes past its own alignment, as in a mapped safetensors file."""

    def shift(tensor):
        raw = torch.empty(4 * tensor.numel() + 2, dtype=torch.uint8)
        raw[2:] = tensor.reshape(-1).view(torch.uint8)
        return torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=2).view(tensor.shape)

    x, weight, experts = (check.randn(*s, dtype=torch.float32) for s in ((3, 37), (5, 37), (2, 6, 37)))
    down, indices, weights = check.randn(2, 37, 3, dtype=torch.float32), torch.tensor([[0], [1], [0]]), torch.ones(3, 1)
    made = kernels.on(isa)
    for name, args, moved in (
        ("linear", (x, weight, x[0, :5].clone()), (1, 2)),
        ("rms_norm", (x, weight[0].clone(), 1e-6), (1,)),
        ("moe_experts", (x, indices, weights, experts, down), (3, 4)),
    ):
        found = getattr(made, name)(*(shift(a) if i in moved else a for i, a in enumerate(args)))
        check.same_bits(found, getattr(made, name)(*args))
