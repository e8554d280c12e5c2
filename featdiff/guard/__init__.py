"""A classifier that also gives verdicts."""
