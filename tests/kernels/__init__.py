"""The device code: what it computes, its machine code, and both on plain integers or interpreted."""
