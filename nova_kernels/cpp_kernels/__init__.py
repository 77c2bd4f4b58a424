"""The ops in C++ for CPUs (csrc/cpp/), through the extension nova_kernels._cpp.

The extension takes addresses and sizes; what it is given is checked here.
"""
