"""A model behind HTTP: what is served, how requests become batches, and the answers. Needs the extra ``serve``."""
