"""The parts of gpu_check: each is measured in a process of its own."""
