"""From a run's student/ folder to an answer on an edge GPU: export, quantize, build, check, benchmark, serve."""
