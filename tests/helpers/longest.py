"""The files of tests that take longest: begun first, so that the processes of a test run end together."""

from __future__ import annotations

LONGEST = (
    "faults/test_figures.py",
    "training/experiment/test_experiment.py",
    "runtime/serve/test_server.py",
    "export/test_functions.py",
    "export/test_library_linears.py",
    "export/test_check.py",
    "runtime/serve/test_load.py",
    "commands/test_training_page.py",
    "docs/test_examples.py",
    "training/distill/test_chain.py",
    "runtime/serve/test_kill.py",
    "runtime/parallel/test_segments.py",
    "export/test_gate.py",
    "runtime/test_bench.py",
    "training/parallel/test_bench.py",
    "runtime/test_reference.py",
    "faults/test_check_cost.py",
    "commands/test_add_a_recipe.py",
    "faults/test_gpu_soak.py",
    "plugins/test_adapter.py",
    "runtime/serve/test_videos.py",
    "plugins/test_every_op.py",
)
