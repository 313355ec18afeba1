"""One operation a file: a kernel, its plain-PyTorch reference, one public function that picks by device."""
