"""What the library may ask of a GPU: launches, waits and copies. A change of a number shows in the diff of this file.

Counts are of the tiny networks (two layers) and equal those of larger ones layer by layer. Reproduce one with
`python -m tests.fake_cuda.count WHAT`.
"""

# Launches of a part's phases; above: a regression, below nine tenths: lower the number here.
LAUNCHES = {
    "forward": {"chunk 0": 32, "chunk 1": 32, "chunk 2": 32},
    "rollout": {"all": 662},
    "vae": {"first chunk": 190, "chunk of 3": 202},
    "update": {"forward": 127, "backward": 147},
    "discriminator": {"encode": 234, "loss": 246, "backward": 634, "optimiser": 94, "score": 240},
}

# Launches of one iteration of a run, of two rollouts.
ITERATIONS = {
    "demo": 6476,
    "table3": 3513,
    "table3, two layers of 1.3B": 3086,
    "sft": 2818,
    "gan": 3950,
    "dmd": 3985,
    "rejection": 1962,
    "stream": 7125,
    "full weights of 1.3B": 2442,
    "graphs": 2770,
    "VideoReward": 4494,
}

# Places where the host may wait for the GPU, with the most times in one part or iteration.
WAITS = {
    "synchronize afd_fast/training/run.py:phase": 10,
    "item afd_fast/training/update.py:<dictcomp>": 5,
    "tolist afd_fast/training/update.py:discriminator_backward": 1,
    "item afd_fast/training/update.py:clip_gradients": 4,
    "item afd_fast/training/credit.py:assign_credit": 3,
    "item afd_fast/training/methods/gan.py:student_backward": 2,
    "item afd_fast/training/methods/rejection.py:iteration": 1,
    "item afd_fast/video_io.py:to_uint8": 1,
    "to the host afd_fast/reference/advantage.py:update": 1,
    "to the host afd_fast/discriminators/discriminator.py:__call__": 2,
    "nonzero afd_fast/discriminators/discriminator.py:check_finite": 2,
    "tolist afd_fast/discriminators/discriminator.py:check_finite": 2,
    "tolist afd_fast/discriminators/videoalign/inputs.py:check_range": 2,
}

# Places that may copy from pageable host memory to the GPU, which waits too.
COPIES = {
    "afd_fast/students/toy/model.py:encode_text": 4,
    "afd_fast/students/wan/family.py:<listcomp>": 4,
    "afd_fast/discriminators/discriminator.py:_noisy": 3,
    "afd_fast/discriminators/toy.py:score": 3,
    "afd_fast/discriminators/toy.py:reduce": 3,
    "afd_fast/training/update.py:noised": 2,
    "afd_fast/training/rollouts.py:sample_policy": 2,
    "afd_fast/training/methods/gan.py:differentiable_rollout": 1,
    "afd_fast/training/methods/gan.py:noised": 4,
    "afd_fast/training/methods/gan.py:diffused": 2,
    "afd_fast/reference/advantage.py:update": 1,
    "afd_fast/reference/transformer.py:rope_tables": 12,
    "afd_fast/discriminators/videoalign/inputs.py:<genexpr>": 4,
    "afd_fast/discriminators/videoalign/inputs.py:to_patches": 2,
    "afd_fast/discriminators/videoalign/model.py:<dictcomp>": 4,
    "afd_fast/discriminators/videoalign/model.py:states_of": 2,
    "afd_fast/discriminators/videoalign/model.py:score": 2,
}

# Of an evaluation and of prompts to files, whose videos come to the host.
EVALUATION = {
    "item afd_fast/video_io.py:to_uint8": 4,
    "to the host afd_fast/training/evaluate.py:student_clips": 2,
    "to the host afd_fast/training/evaluate.py:_of_discriminator": 4,
    "afd_fast/teachers/dataset.py:shown": 4,
    "afd_fast/discriminators/toy.py:reduce": 4,
    "afd_fast/discriminators/toy.py:score": 4,
}
GENERATION = {
    "Event.synchronize afd_fast/generate.py:between": 10,
    "afd_fast/students/wan/family.py:<listcomp>": 6,
    "item afd_fast/video_io.py:checked": 3,
    "item afd_fast/video_io.py:<genexpr>": 6,
}
