"""Video transformers of other libraries, fine-tuned and sampled."""
