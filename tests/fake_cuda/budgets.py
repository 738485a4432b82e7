"""What the library may ask of a GPU: launches, waits and copies. A change of a number shows in the diff of this file.

Counts are of the tiny networks (two layers) and equal those of larger ones layer by layer. Reproduce one with
`python -m tests.fake_cuda.count WHAT`.
"""

# Launches of a part's phases; above: a regression, below nine tenths: lower the number here.
LAUNCHES = {
    "forward": {"chunk 0": 38, "chunk 1": 38, "chunk 2": 38},
    "rollout": {"all": 741},
    "vae": {"first chunk": 190, "chunk of 3": 202},
    "update": {"forward": 135, "backward": 127},
    "discriminator": {"encode": 232, "loss": 246, "backward": 634, "optimiser": 94, "score": 240},
}

# Places where the host may wait for the GPU, with the most times in one part or iteration.
WAITS = {
    "nonzero afd_fast/discriminators/discriminator.py:check_finite": 2,
    "tolist afd_fast/discriminators/discriminator.py:check_finite": 2,
    "tolist afd_fast/discriminators/videoalign/inputs.py:check_range": 2,
}

# Places that may copy from pageable host memory to the GPU, which waits too.
COPIES = {
    "afd_fast/reference/transformer.py:rope_tables": 6,
    "afd_fast/students/wan/model.py:conditioning": 5,
    "afd_fast/discriminators/videoalign/inputs.py:<genexpr>": 4,
    "afd_fast/discriminators/videoalign/inputs.py:to_patches": 2,
    "afd_fast/discriminators/videoalign/model.py:<dictcomp>": 4,
    "afd_fast/discriminators/videoalign/model.py:states_of": 2,
    "afd_fast/discriminators/videoalign/model.py:score": 2,
}
