"""How a run goes: devices, processes, progress, checkpoints."""
