"""The report of a compression: what was done, what came out, and how good it is, as data and as one HTML page."""
