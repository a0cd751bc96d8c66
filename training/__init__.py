"""DeepSpeed jobs: shards to models, models to the registry. One loop trains them all."""
