"""Video autoencoders of other libraries, as models of ours."""
