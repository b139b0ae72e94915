"""The parts of `scripts/gpu-check`, each a module with `run(setup, report)`."""
