"""The codecs on GPUs, in Triton: the bytes of every other kernel, without a wait for the host."""
