"""The suites that come with Longtake, as YAML."""
