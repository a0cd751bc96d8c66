"""The VQGAN of sound: tokens of what is heard in frames."""
