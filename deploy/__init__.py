"""From a run's student/ folder to an answer on an edge GPU: export, check, quantize, build, benchmark, serve, triton."""
