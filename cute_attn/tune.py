"""`python -m cute_attn.tune`: finds the fastest tiles on this GPU. The tool is `cute_attn.tools.tune`."""

from .tools.tune import door

if __name__ == "__main__":
    door()
