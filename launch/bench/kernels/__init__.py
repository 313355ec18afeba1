"""Part `kernels`: each kernel beside PyTorch's operations and the hardware's limit."""
