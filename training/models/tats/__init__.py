"""TATS (arXiv 2204.03638): a time-agnostic VQGAN and time-sensitive transformers over its tokens."""
