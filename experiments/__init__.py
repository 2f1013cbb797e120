"""Studies beside the product: nano, how the tiny Wan was made, benchmarks, a proof on a GPU."""
