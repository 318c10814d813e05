"""Points the parameters and buffers of any ``nn.Module`` at leases."""
