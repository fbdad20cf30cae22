"""MMedExpert-R1, open: specialty LoRA experts (DSA), guideline-based GRPO (GBA), conflict-aware merging (CACI)."""

__version__ = "0.1.0"
