"""Text generation close to what memory allows: packed weights, a reference in torch, and a CPU decode step in Numba."""
