"""The ops in CUDA C++ (csrc/), through the extension nova_kernels._cuda.

The extension takes addresses, sizes and a stream; what it is given is checked here.
"""
