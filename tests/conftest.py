"""Eight virtual devices for every test, and one compilation cache for all of them and their subprocesses."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything reads it: the hub would be asked again and again
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# XLA runs independent collectives of a virtual device side by side, each in a thread of one pool, and that has a thread
# for each device: where all wait for devices that have none left, the process ends.
os.environ.setdefault("NPROC", "64")
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Most of the tests' time is compiling; LLVM's optimisations are a third of that and nothing here runs for long.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slm_assist-xla-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# What is compiled stays, and makes the collector's rounds long: fewer of them.
gc.set_threshold(100_000, 50, 100)

# The longest tests, each with quicker ones beside it: `make test-all` runs them, `make test` keeps to its ten minutes.
# A function's name stands for all its parameters.
SLOW = [
    "test_attention.py::test_a_model_runs_on_a_kernel[splash]",
    "test_attention.py::test_splash_leaves_blocks_out",
    "test_benchmarks.py::test_plain_step_and_online_filter",
    "test_distributed.py::test_a_signal_to_one_stops_both_at_one_step_and_the_command_goes_on",
    "test_distributed.py::test_each_process_reads_only_its_rows",
    "test_distributed.py::test_two_processes_are_one",
    "test_documents.py::test_colab_runs_from_top_to_bottom",
    "test_documents.py::test_readme_commands",
    "test_documents.py::test_readme_names_every_metric",
    "test_documents.py::test_readme_python",
    "test_evidence_work.py::test_from_a_corpus_to_the_page_killed_on_the_way",
    "test_generate.py::test_a_run_writes_samples_and_its_model_generates",
    "test_gifts.py::test_a_branch_has_had_what_its_trunk_had",
    "test_gifts.py::test_a_branch_is_the_run_that_would_have_decayed_there",
    "test_gifts.py::test_a_run_goes_on_without_the_small_lms_that_have_left",
    "test_gifts.py::test_all_gifts_in_one_run_killed_at_every_kind_of_stage",
    "test_gifts.py::test_another_parent_is_refused_before_the_first_checkpoint",
    "test_gifts.py::test_growth_begins_where_the_small_lm_is",
    "test_gifts.py::test_what_cannot_branch_says_why",
    "test_hf.py::test_a_student_grown_from_one_begins_where_it_is[gemma 2]",
    "test_inspect_selection.py::test_the_notebook_runs",
    "test_models.py::test_eight_devices_are_one[sizes0]",
    "test_models.py::test_eight_devices_are_one[sizes1]",
    "test_models.py::test_eight_devices_are_one[sizes2]",
    "test_models.py::test_remat_changes_nothing_but_memory[full-False]",
    "test_models.py::test_remat_changes_nothing_but_memory[full-True]",
    "test_online.py::test_eight_devices_exchange_kept_rows_and_not_the_pool",
    "test_online.py::test_rho1_learns_from_the_top_share_of_tokens[4]",
    "test_optim.py::test_scanned_layers_are_updated_as_unrolled_ones[adafactor]",
    "test_own.py::test_every_kind_at_once_from_another_package",
    "test_own.py::test_resumes_bit_for_bit_and_needs_no_tables_in_stage_2",
    "test_plan.py::test_memory_is_near_what_xla_says",
    "test_pretrained_notebook.py::test_it_runs_from_top_to_bottom",
    "test_representations.py::test_an_inner_layer_of_the_guide",
    "test_representations.py::test_any_mesh_and_microbatches_give_the_same[shape1-2]",
    "test_representations.py::test_one_forward_pass_serves_soft_labels_and_representations",
    "test_scoring.py::test_eight_devices_agree_with_one",
    "test_selecting_runs.py::test_killed_and_resumed_equals_straight[auto]",
    "test_selecting_runs.py::test_killed_and_resumed_equals_straight[salt_ds]",
    "test_seqio.py::test_packed_documents_have_the_loss_they_have_alone",
    "test_steps.py::test_eight_devices_equal_one[assisted-shape0]",
    "test_steps.py::test_eight_devices_equal_one[assisted-shape1]",
    "test_steps.py::test_eight_devices_equal_one[assisted-shape2]",
    "test_steps.py::test_eight_devices_equal_one[plain-shape4]",
    "test_stream.py::test_stopped_anywhere_it_goes_on_exactly[st_generated-False-False]",
    "test_stream.py::test_stopped_anywhere_it_goes_on_exactly[st_mixture-True-False]",
    "test_theory_figures.py::test_every_figure_has_numbers_and_a_picture",
    "test_theory_figures.py::test_the_notebook_runs",
    "test_train.py::test_goes_on_with_another_mesh",
    "test_train.py::test_identical_seeds_identical_runs_and_other_seeds_differ",
    "test_train.py::test_killed_and_resumed_equals_straight[6]",
    "test_train.py::test_signal_saves_and_leaves[2]",
    "test_weights.py::test_eight_devices_are_one[True-False]",
    "test_weights.py::test_logits_are_the_parents[all odd, untied, unrolled]",
    "test_weights.py::test_logits_are_the_parents_at_any_shape[2]",
    "test_weights_learning.py::test_clones_part",
]


def pytest_collection_modifyitems(items):
    found = set()
    for item in items:
        names = {item.nodeid.removeprefix("tests/"), f"{item.path.name}::{item.originalname}"}
        if names & set(SLOW):
            found |= names
            item.add_marker(pytest.mark.slow)
    files = {item.path.name for item in items}
    gone = [name for name in SLOW if name not in found and name.partition("::")[0] in files and len(items) > 1000]
    if gone:
        raise pytest.UsageError(f"tests/conftest.py: SLOW has {gone[0]}, and there is no such test")
