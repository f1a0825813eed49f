"""What runs around the compiled model: the paged cache, sampling, Qwen3's thinking under control, the decode loop."""
