"""Presets: one TOML file per run, named by what it is."""
