"""Latte (arXiv 2401.03048), the prior of PV-VAE."""
