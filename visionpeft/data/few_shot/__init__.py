"""Few-shot CLIP benchmarks: definitions, splits, draws."""
