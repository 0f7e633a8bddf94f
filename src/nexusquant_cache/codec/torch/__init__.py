"""The codec in plain torch: what every other implementation is compared with."""
