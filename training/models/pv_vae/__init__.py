"""The predictive video VAE of PV-VAE (arXiv 2605.02134)."""
