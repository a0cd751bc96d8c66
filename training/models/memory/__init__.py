"""Memory of long videos (arXiv 2512.23851): a transformer that generates video segment by segment and remembers it.

The memory     tokens, encoder, baselines, variants; model_config, model: what every transformer with one has
Transformers   dit_config, dit: our own; foreign: one of another library
Its data       stretch, history: latents in order, and what a segment is given of those before it
Training       config, data, base, base_foreign, shared, then the stages pretrain (retrieval) and finetune (generation)
Measurement    retrieval, continuation; judge for the gate
Use            segments (generation), recall (retrieval), both by a registered model: prior; kind for the registry

A step is an optimizer step or the solver's, never a latent, but for names in files and batches: `history_steps`,
`stream_step`, config.json's `steps`. A segment is generated at once; the recent latents are given clean beside the memory.
"""
