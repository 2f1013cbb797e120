"""Studies beside the product: nano, how the tiny Wan was made, benches and the proof on a GPU."""
