"""What `python -m cute_attn.tune` is made of: the candidates, their timing on the GPU, and the choice among them."""
