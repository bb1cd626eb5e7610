"""`python -m cute_attn.validate`: runs the gates in order, a line each. The tool is `cute_attn.tools.validate`."""

from .tools.validate import main

if __name__ == "__main__":
    raise SystemExit(main())
