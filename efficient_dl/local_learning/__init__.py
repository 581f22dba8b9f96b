"""Training a network part by part: cutting it, local objectives, and the ranks that train the parts."""
