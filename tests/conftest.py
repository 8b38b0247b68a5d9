"""Eight virtual devices for every test, and one compilation cache for all of them and their subprocesses."""

import atexit
import os
import shutil
import tempfile

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
