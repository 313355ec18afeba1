"""Which rows are on the device, and the stores that hold them."""
