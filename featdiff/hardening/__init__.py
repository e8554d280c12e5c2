"""Outlier-aware learning: a classifier fine-tuned with synthetic outliers, its accuracy kept by distillation."""
