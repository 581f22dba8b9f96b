"""The codecs in C++ behind a C interface (edl_codec.h), for CPU tensors; `build.sh` compiles them in a checkout."""
