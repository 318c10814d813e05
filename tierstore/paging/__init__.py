"""KV pages across HBM, RAM and NVMe: where each cell is, and what moves it."""
