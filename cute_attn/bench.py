"""`python -m cute_attn.bench`: times us beside others. The tool is `cute_attn.tools.bench`."""

from .tools.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
