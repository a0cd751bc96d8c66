"""EncGAN3 and REncGAN3 (arXiv 2512.21776): a VAE-GAN of content and movement, and recall that joins its clips."""
