"""Take a student from its run to a device: export, quantize, build, check, benchmark, serve."""
