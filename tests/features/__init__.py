"""What a call can ask for, and what a kernel can do otherwise: a file each."""
