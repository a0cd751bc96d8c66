"""Ray jobs: raw video to shards, caches and views. Plain functions here, the Ray graphs in `stages`."""
