"""The operations behind `fastrecycle.ops`: an fp32 reference of each in plain PyTorch."""
