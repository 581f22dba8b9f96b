"""The same kernels for each kind of processor: reference (torch), native (C++)."""
