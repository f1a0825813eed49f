"""What runs around the compiled model: the paged cache and the generation loop."""
