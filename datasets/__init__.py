"""The contract on disk: schemas, shards, caches and the loader. Knows no Ray, no DeepSpeed, no MLflow."""
