"""Learn which weights of a frozen network to keep: N:M masks by Gumbel-softmax.

The method is that of Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models" (NeurIPS 2024,
arXiv 2409.17481), written from the paper's mathematics. Pure torch: no command line, no recipes, no files but masks.
"""
