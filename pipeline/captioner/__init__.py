"""Captioners: what describes clips that have no captions, by an endpoint or by a local model.

`frames` are what a captioner sees of a clip, `reply` is what it is asked and what counts as an answer. `endpoint` asks a
server, whose words `server` reads; `model` asks a model in this process. `answers` keeps what was answered until its shard is
committed, `shard` makes one shard, and `meter` counts requests over all workers.
"""
