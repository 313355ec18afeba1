"""How a run is, seen from outside by its folder alone; imports no PyTorch."""
