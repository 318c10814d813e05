"""The parts of bench_streaming.py: memory caps, disks, child processes, what they measure, and the table."""
