"""The parts of `python -m cute_attn.bench`; `timing.compare` also serves other scripts. Needs `cute_attn[bench]`."""
