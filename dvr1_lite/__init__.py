"""DeepVideo-R1 Lite: Reg-GRPO with difficulty-aware augmentation, small enough to read (arXiv 2506.07464)."""

__version__ = "0.1.0"
