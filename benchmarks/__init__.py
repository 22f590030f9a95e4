"""Measurements of flash_ext beside torch's own attention. Run as modules from the repository root.

demo             the main job: every implementation side by side on a few shapes (`make demo`)
bench_attention  the papers' grid of shapes (`make bench`)
small_shapes     v1, v2 and v3 against naive attention on the shapes where launches, not FLOPs, decide
features         what the arguments of general attention cost, beside SDPA and compiled FlexAttention
memory           extra device memory by sequence length
host_time        what one call costs the CPU thread that makes it
hbm_traffic      bytes moved through device memory, by the profiler's counters
train_check      a small GPT trained with flash_ext and with exact attention (`make train-check`)
gpu_check        tests, memory checker and bit repeatability on a GPU (`make gpu-check`)
mask_pictures    what masks, biases and the like do to the softmax weights, drawn by the kernels
claims           the numbers the package promises beside what was measured
readme_tables    writes the recorded results into README.md

Results go to benchmarks/results/<device>/NAME.json, each with the commit and versions it was measured at.
"""
