"""One operation per folder: kernels, a plain-PyTorch reference, and a public function that picks by device."""
