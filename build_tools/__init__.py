"""What it takes to build flash_ext: used by setup.py, pip and make, never installed.

backend        lets pip's isolated build see the torch that will run the extension
toolchain      finds GPUs, nvcc, architectures and a number of jobs, and explains what is missing
instances      the table of kernel instances and their generated translation units
check_kernels  compiles every instance with nvcc alone and reads ptxas's log (`make kernels`)
environment    makes .venv (`make`)
"""
