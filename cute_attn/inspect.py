"""`python -m cute_attn.inspect`: what a shape's kernel is made of. The tool is `cute_attn.tools.inspect`."""

from .tools.inspect import bounds, ptx, report, sass
from .tools.inspect.__main__ import main

__all__ = ["bounds", "main", "ptx", "report", "sass"]

if __name__ == "__main__":
    raise SystemExit(main())
