"""Part `links`: records between host memory and the device."""
