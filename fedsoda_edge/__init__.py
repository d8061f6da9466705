"""What runs on a device, and the contract both sides speak."""
