"""The codecs in plain torch operations: the definition that every faster kernel must match byte for byte."""
