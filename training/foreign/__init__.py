"""Models of other libraries as codecs and backbones: folders in the layout of diffusers, and their adapters.

`folder` knows such folders and `load` makes modules of their parts; `codec` is any video autoencoder, `backbone` any
transformer; `adapters` reads and writes low-rank changes by the names of other tools. diffusers is imported late.
"""
