"""The codec in plain torch: what every other implementation is compared with, and what runs where none can."""
