"""One thin file per framework that cute_attn is used from."""
