"""Other ways in: torch, transformers, FlashAttention's interface, arrays of other libraries."""
